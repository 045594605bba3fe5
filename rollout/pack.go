package rollout

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"trainerd/internal/fault"
)

// Segment is a run of tokens of a Packed row: a prompt (Prefix -1) or a
// completion without its last token, which predicts nothing.
type Segment struct {
	Start, Len int
	Prefix     int // index of the prompt's segment, or -1
}

// Span ties a completion's predictions to where it came from.
type Span struct {
	Group, Rollout int // indices in the slice given to Pack, and in Group.Rollouts
	Start, Len     int // predictions [Start, Start+Len) of Rows and Targets
}

// Packed is one micro-batch without padding, each prompt once.
type Packed struct {
	Tokens    []int32 // [T]
	Positions []int32 // [T]
	Segments  []Segment
	Rows      []int32 // [N] token whose hidden state predicts
	Targets   []int32 // [N]
	Spans     []Span  // in order, covering [0,N)
}

// Costs in units of one attended (query, key) pair. Per layer of width d a pair
// costs 4d FLOPs and a token's projections about 24d², so a token is worth 6d
// pairs; d = 1024 is the middle of the models this serves. A prediction pays the
// LM head, about a quarter of a token there. Balance needs no better estimate,
// and one that knew the model would make packing depend on it.
const (
	tokenCost      = 6 * 1024
	predictionCost = tokenCost / 4
)

// piece is a prompt with some completions of its group: what is packed whole.
type piece struct {
	group    int
	rollouts []int // indices in Group.Rollouts, ascending
	tokens   int   // of the forward row
	work     int64 // in attended pairs
}

// ints is how many int32 a piece takes in a Packed: tokens with their positions,
// predictions with their targets.
func (p *piece) ints(groups []Group) int {
	n := p.tokens
	for _, r := range p.rollouts {
		n += len(groups[p.group].Rollouts[r].Completion)
	}
	return 2 * n
}

// Pack cuts groups into micro-batches of at most maxTokens tokens, balanced by
// work. A group larger than maxTokens is split between completions, its prompt
// repeated in each part; a single prompt and completion over maxTokens is an
// Invalid fault that names the group. Pack is a pure function of its arguments.
func Pack(groups []Group, maxTokens int) ([]Packed, error) {
	out, _, err := PackIn(nil, groups, maxTokens)
	return out, err
}

// PackIn is Pack in the memory of mem, as far as that goes. It returns the memory
// that the micro-batches lie in, for another call once nobody looks at them.
func PackIn(mem []int32, groups []Group, maxTokens int) (out []Packed, used []int32, err error) {
	if maxTokens < 1 || maxTokens > math.MaxInt32 {
		return nil, nil, fault.BadField("max_tokens_per_micro_batch", maxTokens, "1..2147483647")
	}
	var pieces []piece
	for g := range groups {
		if err := packable(&groups[g], maxTokens); err != nil {
			return nil, nil, err
		}
		pieces = append(pieces, split(groups, g, maxTokens)...)
	}
	bins := assign(pieces, maxTokens)
	need := 0
	for i := range pieces {
		need += pieces[i].ints(groups)
	}
	if cap(mem) < need {
		mem = make([]int32, need)
	}
	used = mem[:need]
	free := used
	longest := 0
	for _, bin := range bins {
		tokens := 0
		for _, i := range bin {
			tokens += pieces[i].tokens
		}
		longest = max(longest, tokens)
	}
	counted := make([]int32, longest)
	for i := range counted {
		counted[i] = int32(i)
	}
	out = make([]Packed, len(bins))
	for i, bin := range bins {
		out[i], free = lay(groups, pieces, bin, counted, free)
	}
	return out, used, nil
}

// packable says whether each completion of a group fits beside its prompt.
func packable(g *Group, maxTokens int) error {
	name := fmt.Sprintf("group %q", g.ID)
	if len(g.Prompt) == 0 {
		return fault.BadField(name, "an empty prompt", "at least one prompt token")
	}
	if len(g.Rollouts) == 0 {
		return fault.BadField(name, "no rollouts", "at least one rollout")
	}
	for i := range g.Rollouts {
		c := len(g.Rollouts[i].Completion)
		if c == 0 {
			return fault.BadField(name, fmt.Sprintf("an empty completion (rollout %d)", i), "at least one completion token")
		}
		if need := len(g.Prompt) + c - 1; need > maxTokens {
			return fault.BadField(name, fmt.Sprintf("%d tokens of prompt and completion (rollout %d)", need, i),
				fmt.Sprintf("at most max_tokens_per_micro_batch = %d", maxTokens))
		}
	}
	return nil
}

// split cuts a group into the fewest pieces it can find, of even size.
func split(groups []Group, g, maxTokens int) []piece {
	group := &groups[g]
	P := len(group.Prompt)
	forward := func(i int) int { return len(group.Rollouts[i].Completion) - 1 }
	total := 0
	order := make([]int, len(group.Rollouts))
	for i := range order {
		order[i] = i
		total += forward(i)
	}
	if P+total <= maxTokens {
		return []piece{measure(group, g, order)}
	}
	room := maxTokens - P // over 0, since some completion has forward tokens and fits
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(forward(b), forward(a)) })
	for n := (total + room - 1) / room; ; n++ {
		// Longest first into the emptiest part. With a part per completion it always fits.
		parts, load := make([][]int, n), make([]int, n)
		fits := true
		for _, i := range order {
			least := 0
			for k := range load {
				if load[k] < load[least] {
					least = k
				}
			}
			if load[least]+forward(i) > room {
				fits = false
				break
			}
			load[least] += forward(i)
			parts[least] = append(parts[least], i)
		}
		if !fits {
			continue
		}
		var out []piece
		for _, part := range parts {
			if len(part) > 0 {
				slices.Sort(part)
				out = append(out, measure(group, g, part))
			}
		}
		slices.SortFunc(out, func(a, b piece) int { return cmp.Compare(a.rollouts[0], b.rollouts[0]) })
		return out
	}
}

func measure(group *Group, g int, rollouts []int) piece {
	P := int64(len(group.Prompt))
	p := piece{group: g, rollouts: rollouts, tokens: len(group.Prompt)}
	p.work = P*tokenCost + P*(P+1)/2
	for _, i := range rollouts {
		n := int64(len(group.Rollouts[i].Completion))
		c := n - 1
		p.tokens += int(c)
		p.work += c*tokenCost + c*P + c*(c+1)/2 + n*predictionCost
	}
	return p
}

// assign puts pieces into bins of at most maxTokens. First-fit decreasing by
// tokens finds a small number of bins; longest-first into the bin with the least
// work then evens them out, and where its tighter order does not fit the
// first-fit bins stand. Each bin lists indices of pieces, ascending.
func assign(pieces []piece, maxTokens int) [][]int {
	order := make([]int, len(pieces))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(pieces[b].tokens, pieces[a].tokens) })
	var bins [][]int
	var free []int
	for _, i := range order {
		k := slices.IndexFunc(free, func(f int) bool { return f >= pieces[i].tokens })
		if k < 0 {
			k = len(bins)
			bins, free = append(bins, nil), append(free, maxTokens)
		}
		bins[k] = append(bins[k], i)
		free[k] -= pieces[i].tokens
	}

	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(pieces[b].work, pieces[a].work) })
	even := make([][]int, len(bins))
	tokens, work := make([]int, len(bins)), make([]int64, len(bins))
	for _, i := range order {
		best := -1
		for k := range even {
			if tokens[k]+pieces[i].tokens <= maxTokens && (best < 0 || work[k] < work[best]) {
				best = k
			}
		}
		if best < 0 {
			even = nil
			break
		}
		even[best] = append(even[best], i)
		tokens[best] += pieces[i].tokens
		work[best] += pieces[i].work
	}
	if even != nil {
		bins = even
	}
	for _, b := range bins {
		slices.Sort(b)
	}
	slices.SortFunc(bins, func(a, b []int) int { return cmp.Compare(a[0], b[0]) })
	return bins
}

// lay writes the pieces of one bin as a row of tokens, at the beginning of free,
// and returns the rest of it. counted is 0, 1, 2, ... for each token: runs of
// numbers are copied from it, which is several times as fast as counting.
func lay(groups []Group, pieces []piece, bin []int, counted, free []int32) (Packed, []int32) {
	var T, N, S, R int
	for _, i := range bin {
		T += pieces[i].tokens
		S += 1 + len(pieces[i].rollouts)
		R += len(pieces[i].rollouts)
		for _, r := range pieces[i].rollouts {
			N += len(groups[pieces[i].group].Rollouts[r].Completion)
		}
	}
	part := func(n int) (out []int32) {
		out, free = free[:n:n], free[n:]
		return out
	}
	p := Packed{
		Tokens:    part(T),
		Positions: part(T),
		Segments:  make([]Segment, 0, S),
		Rows:      part(N),
		Targets:   part(N),
		Spans:     make([]Span, 0, R),
	}
	at, row := 0, 0 // in Tokens and Positions, in Rows and Targets
	segment := func(tokens []int32, position, prefix int) {
		p.Segments = append(p.Segments, Segment{Start: at, Len: len(tokens), Prefix: prefix})
		copy(p.Tokens[at:], tokens)
		copy(p.Positions[at:at+len(tokens)], counted[position:])
		at += len(tokens)
	}
	for _, i := range bin {
		group := &groups[pieces[i].group]
		prefix := len(p.Segments)
		segment(group.Prompt, 0, -1)
		last := int32(at - 1) // predicts the first token of every completion
		for _, r := range pieces[i].rollouts {
			c := group.Rollouts[r].Completion
			p.Spans = append(p.Spans, Span{Group: pieces[i].group, Rollout: r, Start: row, Len: len(c)})
			copy(p.Targets[row:], c)
			p.Rows[row] = last
			copy(p.Rows[row+1:row+len(c)], counted[at:])
			row += len(c)
			if len(c) > 1 {
				segment(c[:len(c)-1], len(group.Prompt), prefix)
			}
		}
	}
	return p, free
}
