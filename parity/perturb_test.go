package parity

import (
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/model"
)

// missFactor is how far beyond its tolerance a wrong model must land.
const missFactor = 100

// perturbation makes one mistake on our side, in the config, the weights or the batch.
type perturbation struct {
	name   string
	source func(model.Source) model.Source // nil: as it is
	batch  func(*golden, *packed)          // nil: as it is
	only   func(model.Config) bool         // nil: every architecture
}

var perturbations = []perturbation{
	{name: "RoPE off", batch: func(_ *golden, p *packed) { clear(p.batch.Positions) }},
	{name: "theta doubled", source: func(s model.Source) model.Source { return wrongTheta{s} }},
	{name: "heads mapped h%KV", source: func(s model.Source) model.Source { return wrongHeads{s} },
		// With one key head, or one per query head, both mappings are the same.
		only: func(c model.Config) bool { return c.KVHeads > 1 && c.KVHeads < c.Heads }},
	{name: "prompt hidden", batch: func(_ *golden, p *packed) {
		for i := range p.batch.Segments {
			p.batch.Segments[i].Prefix = -1
		}
	}},
	{name: "mask shifted by one", batch: func(g *golden, p *packed) { g.resegment(p, shifted) }},
	{name: "siblings seen", batch: func(g *golden, p *packed) { g.resegment(p, joined) }},
}

// wrongTheta doubles the base of the rotary angles.
type wrongTheta struct{ model.Source }

func (s wrongTheta) Config() model.Config {
	c := s.Source.Config()
	c.RopeTheta *= 2
	return c
}

// wrongHeads reorders query heads (rows of q_proj, columns of o_proj) so that
// our grouping h/(H/KV) computes what the grouping h%KV would.
type wrongHeads struct{ model.Source }

func (s wrongHeads) Read(name string, dst *tensor.Dense) error {
	if err := s.Source.Read(name, dst); err != nil {
		return err
	}
	c := s.Config()
	x := dst.Data().([]float32)
	from := append([]float32{}, x...)
	hd, share := c.HeadDim, c.Heads/c.KVHeads
	for to := range c.Heads {
		h := to%share*c.KVHeads + to/share // the to-th head of our order is head h
		switch tail(name) {
		case "self_attn.q_proj.weight":
			n := hd * c.Hidden
			copy(x[to*n:(to+1)*n], from[h*n:(h+1)*n])
		case "self_attn.q_proj.bias":
			copy(x[to*hd:(to+1)*hd], from[h*hd:(h+1)*hd])
		case "self_attn.o_proj.weight":
			width := c.Heads * hd
			for row := range c.Hidden {
				copy(x[row*width+to*hd:row*width+(to+1)*hd], from[row*width+h*hd:row*width+(h+1)*hd])
			}
		}
	}
	return nil
}

// tail is a tensor's name without "model.layers.N.".
func tail(name string) string {
	dots := 0
	for i := range name {
		if name[i] == '.' {
			if dots++; dots == 3 {
				return name[i+1:]
			}
		}
	}
	return name
}

// sight is what a completion sees of its group.
type sight int

const (
	right   sight = iota
	shifted       // not the last token of the prompt
	joined        // its elder siblings too
)

// resegment rebuilds a whole golden as one micro-batch with a given sight; the
// predictions keep their order, so loss and expectations stay valid.
func (g *golden) resegment(p *packed, what sight) {
	b := model.Batch{Targets: p.batch.Targets}
	add := func(tokens []int32, first int, prefix int) {
		b.Segments = append(b.Segments, model.Segment{Start: len(b.Tokens), Len: len(tokens), Prefix: prefix})
		for i, tok := range tokens {
			b.Tokens = append(b.Tokens, tok)
			b.Positions = append(b.Positions, int32(first+i))
		}
	}
	starts := map[[2]int]int{} // completion to the row of its first token
	last := map[int]int{}      // group to the row of its last prompt token
	for gi, group := range g.Groups {
		prompt, n := len(b.Segments), len(group.Prompt)
		if what == shifted {
			add(group.Prompt[:n-1], 0, -1)
			add(group.Prompt[n-1:], n-1, prompt)
		} else {
			add(group.Prompt, 0, -1)
		}
		last[gi] = len(b.Tokens) - 1
		first := len(b.Segments)
		for ci, c := range group.Completions {
			starts[[2]int{gi, ci}] = len(b.Tokens)
			add(c.Tokens[:len(c.Tokens)-1], n, prompt)
		}
		if what == joined {
			one := b.Segments[first]
			one.Len = len(b.Tokens) - one.Start
			b.Segments = append(b.Segments[:first], one)
		}
	}
	for _, s := range p.spans {
		b.Rows = append(b.Rows, int32(last[s.Group]))
		for i := range s.Len - 1 {
			b.Rows = append(b.Rows, int32(starts[[2]int{s.Group, s.Rollout}]+i))
		}
	}
	p.batch = b
}

// TestGoldensCanFail: each mistake misses both tolerances by a factor of 100.
func TestGoldensCanFail(t *testing.T) {
	dev := device(t)
	for _, name := range smallCases {
		t.Run(name, func(t *testing.T) {
			g := readGolden(t, name+"/golden.json")
			ref := openDir(t, name+"/gradient")
			for _, p := range perturbations {
				score, grad, ok := p.distances(t, dev, g, openDir(t, name), ref)
				if !ok {
					continue
				}
				t.Logf("%-20s log-probs off by %8.2g, gradient by %8.2g", p.name, score, grad)
				if score < missFactor*logProbTolerance {
					t.Errorf("%s: log-probs off by only %g", p.name, score)
				}
				if grad < missFactor*gradTolerance {
					t.Errorf("%s: gradient off by only %g", p.name, grad)
				}
			}
		})
	}
}

// TestResegmentIsSound: rebuilt with the right sight, a batch meets the tolerance,
// so what the perturbed ones show is the perturbation.
func TestResegmentIsSound(t *testing.T) {
	dev := device(t)
	for _, name := range smallCases {
		g := readGolden(t, name+"/golden.json")
		packs := g.pack(t, smallTokens)
		g.resegment(&packs[0], right)
		if d := scoreDistance(t, load(t, dev, openDir(t, name), smallTokens), packs); !(d <= logProbTolerance) {
			t.Errorf("%s: log-probs differ by %g", name, d)
		}
	}
}

// distances runs a golden with one mistake; ok is false where the mistake changes nothing.
func (p perturbation) distances(t *testing.T, dev kernels.Device, g *golden, src, ref model.Source) (score, grad float64, ok bool) {
	t.Helper()
	if p.only != nil && !p.only(src.Config()) {
		return 0, 0, false
	}
	if p.source != nil {
		src = p.source(src)
	}
	m := load(t, dev, src, smallTokens)
	packs := g.pack(t, smallTokens)
	if len(packs) != 1 {
		t.Fatalf("%d micro-batches, expected 1", len(packs))
	}
	if p.batch != nil {
		p.batch(g, &packs[0])
	}
	score = scoreDistance(t, m, packs)
	grad, _ = gradientDistance(t, gradient(t, m, packs), ref)
	return score, grad, true
}
