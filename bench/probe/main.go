// Command probe runs one batch of a Hugging Face model directory on a device
// and writes what bench/device_compare.py compares with PyTorch.
//
//	probe DEVICE MODEL GROUPS.json OUT            log-probs, entropies and gradients
//	probe DEVICE MODEL GROUPS.json OUT STEPS LR   the loss of so many steps on the same batch
//
// GROUPS.json is a list of {"prompt": [ids], "completions": [{"tokens": [ids], "adv": a}]}.
// The loss is -sum of adv*logp over all tokens, divided by their number (the clipped surrogate on policy).
// OUT.json names arrays and where they start in OUT.bin (float32).
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/model"
	"trainerd/model/hf"
)

type group struct {
	Prompt      []int32 `json:"prompt"`
	Completions []struct {
		Tokens []int32 `json:"tokens"`
		Adv    float32 `json:"adv"`
	} `json:"completions"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

// open takes "cpu" or "cuda:N".
func open(name string) (kernels.Device, error) {
	if name == "cpu" {
		return cpu.New(0)
	}
	n, err := strconv.Atoi(strings.TrimPrefix(name, "cuda:"))
	if err != nil {
		return nil, fmt.Errorf("device %q, expected cpu or cuda:N", name)
	}
	return openCUDA(n)
}

func run(args []string) error {
	if len(args) != 4 && len(args) != 6 {
		return fmt.Errorf("%d arguments, expected DEVICE MODEL GROUPS.json OUT [STEPS LR]", len(args))
	}
	dev, err := open(args[0])
	if err != nil {
		return err
	}
	defer dev.Close()
	src, err := hf.Open(args[1])
	if err != nil {
		return err
	}
	defer src.Close()
	text, err := os.ReadFile(args[2])
	if err != nil {
		return err
	}
	var groups []group
	if err := json.Unmarshal(text, &groups); err != nil {
		return fmt.Errorf("%s: %w", args[2], err)
	}
	b, l := batch(groups)
	ctx := context.Background()
	m, err := model.Load(ctx, dev, src, model.Options{Train: true, MaxTokens: len(b.Tokens)})
	if err != nil {
		return err
	}
	defer m.Close()
	w, err := newWriter(args[3])
	if err != nil {
		return err
	}
	if len(args) == 6 {
		if err := steps(m, w, b, l, args[4], args[5]); err != nil {
			return err
		}
		return w.close()
	}
	s, err := m.ForwardBackward(b, l)
	if err != nil {
		return err
	}
	if err := w.put("logprobs", s.LogProb); err != nil {
		return err
	}
	if err := w.put("entropies", s.Entropy); err != nil {
		return err
	}
	g := m.Gradient()
	defer g.Close()
	for _, name := range g.Names() {
		shape, _ := g.Shape(name)
		x := tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
		if err := g.Read(name, x); err != nil {
			return err
		}
		if err := w.put(name, x.Data().([]float32)); err != nil {
			return err
		}
	}
	return w.close()
}

// batch packs the groups: every prompt once, its completions behind it.
func batch(groups []group) (*model.Batch, model.Loss) {
	b, l := &model.Batch{}, model.Loss{Surrogate: kernels.Surrogate{Kind: kernels.SurrogateClip, EpsLow: 0.2, EpsHigh: 0.28}, Temperature: 1}
	add := func(ids []int32, at int) {
		for i, id := range ids {
			b.Tokens, b.Positions = append(b.Tokens, id), append(b.Positions, int32(at+i))
		}
	}
	for _, g := range groups {
		last := len(b.Tokens) + len(g.Prompt) - 1
		prompt := len(b.Segments)
		b.Segments = append(b.Segments, model.Segment{Start: len(b.Tokens), Len: len(g.Prompt), Prefix: -1})
		add(g.Prompt, 0)
		for _, c := range g.Completions {
			from := len(b.Tokens)
			b.Segments = append(b.Segments, model.Segment{Start: from, Len: len(c.Tokens) - 1, Prefix: prompt})
			add(c.Tokens[:len(c.Tokens)-1], len(g.Prompt))
			for i, id := range c.Tokens {
				row := from + i - 1
				if i == 0 {
					row = last
				}
				b.Rows, b.Targets, l.Adv = append(b.Rows, int32(row)), append(b.Targets, id), append(l.Adv, c.Adv)
			}
		}
	}
	for range b.Rows {
		l.Weight = append(l.Weight, 1/float32(len(b.Rows)))
	}
	return b, l
}

// steps trains on the batch again and again with AdamW and writes sum(-adv*logp)/N before each step.
func steps(m *model.Model, w *writer, b *model.Batch, l model.Loss, count, rate string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	lr, err := strconv.ParseFloat(rate, 64)
	if err != nil {
		return err
	}
	var losses []float32
	for range n {
		s, err := m.ForwardBackward(b, l)
		if err != nil {
			return err
		}
		sum := 0.0
		for i, lp := range s.LogProb {
			sum -= float64(l.Adv[i]) * float64(lp)
		}
		losses = append(losses, float32(sum/float64(len(s.LogProb))))
		if _, err := m.OptimStep(model.AdamW{LR: lr, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, MaxGradNorm: 1}); err != nil {
			return err
		}
	}
	return w.put("losses", losses)
}

// writer writes arrays to OUT.bin and their places to OUT.json.
type writer struct {
	f     *os.File
	b     *bufio.Writer
	path  string
	at    int
	index map[string][2]int // first element and length
}

func newWriter(path string) (*writer, error) {
	f, err := os.Create(path + ".bin")
	if err != nil {
		return nil, err
	}
	return &writer{f: f, b: bufio.NewWriterSize(f, 1<<20), path: path, index: map[string][2]int{}}, nil
}

func (w *writer) put(name string, x []float32) error {
	w.index[name] = [2]int{w.at, len(x)}
	w.at += len(x)
	return binary.Write(w.b, binary.LittleEndian, x)
}

func (w *writer) close() error {
	if err := w.b.Flush(); err != nil {
		return err
	}
	if err := w.f.Close(); err != nil {
		return err
	}
	text, err := json.Marshal(w.index)
	if err != nil {
		return err
	}
	return os.WriteFile(w.path+".json", text, 0o644)
}
