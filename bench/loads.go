package bench

import (
	"fmt"

	"trainerd/model"
)

// Load is a set of rollouts: groups that share a prompt, by completion length.
type Load struct {
	Name   string
	Prompt int     // tokens of every prompt
	Groups [][]int // completion lengths
}

// Rollouts returns the number of completions.
func (l Load) Rollouts() int {
	n := 0
	for _, g := range l.Groups {
		n += len(g)
	}
	return n
}

// The lengths are what torch_baseline.py's load() draws (torch.Generator, seed 7).
var loads = []Load{
	{"smoke", 16, [][]int{same(4, 8), same(4, 8)}}, // to see that a benchmark runs
	{"cpu512", 512, [][]int{{64, 64, 64, 64, 64, 64, 64}}},
	{"flat", 256, [][]int{same(8, 768), same(8, 768), same(8, 768), same(8, 768)}},
	{"secloop", 1536, [][]int{
		{148, 237, 256, 91, 372, 102, 133}, {296, 171, 68, 187, 170, 171, 180},
		{321, 313, 384, 177, 384, 384, 384}, {101, 127, 111, 303, 97, 384, 118}}},
	{"reason", 128, [][]int{
		{594, 948, 1027, 366, 1490, 409, 535, 1185}, {685, 275, 750, 683, 685, 721, 1285, 1255},
		{2048, 708, 2048, 1762, 1557, 404, 509, 445}, {1213, 389, 1585, 473, 1434, 1680, 518, 613},
		{391, 342, 582, 737, 683, 754, 615, 403}, {248, 1058, 452, 1006, 675, 869, 754, 412},
		{276, 445, 1036, 684, 841, 1861, 412, 225}, {1599, 485, 1076, 340, 787, 333, 795, 360}}},
}

func same(n, v int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = v
	}
	return out
}

// LoadByName returns one of smoke, cpu512, flat, secloop, reason.
func LoadByName(name string) (Load, error) {
	for _, l := range loads {
		if l.Name == name {
			return l, nil
		}
	}
	return Load{}, fmt.Errorf("unknown load %q, expected smoke, cpu512, flat, secloop or reason", name)
}

// Shape returns the model of a size name, as in torch_baseline.py (Qwen2, random weights).
func Shape(name string) (model.Config, error) {
	c := model.Config{Type: "qwen2", QKVBias: true, MaxPositions: 32768, RopeTheta: 10000, NormEps: 1e-6, InitStd: 0.02, BOS: -1}
	switch name {
	case "smoke":
		c.Hidden, c.FFN, c.Layers, c.Heads, c.KVHeads, c.Vocab, c.Tied = 32, 64, 2, 4, 2, 256, true
	case "135m":
		c.Hidden, c.FFN, c.Layers, c.Heads, c.KVHeads, c.Vocab, c.Tied = 576, 1536, 30, 9, 3, 49152, true
	case "0.5b":
		c.Hidden, c.FFN, c.Layers, c.Heads, c.KVHeads, c.Vocab, c.Tied = 896, 4864, 24, 14, 2, 151936, true
	case "1.5b":
		c.Hidden, c.FFN, c.Layers, c.Heads, c.KVHeads, c.Vocab, c.Tied = 1536, 8960, 28, 12, 2, 151936, true
	case "7b":
		c.Hidden, c.FFN, c.Layers, c.Heads, c.KVHeads, c.Vocab = 3584, 18944, 28, 28, 4, 152064
	default:
		return c, fmt.Errorf("unknown shape %q, expected smoke, 135m, 0.5b, 1.5b or 7b", name)
	}
	c.HeadDim = c.Hidden / c.Heads
	return c, nil
}

// Tokens returns the tokens that a load needs computed: each prompt once.
func (l Load) Tokens() int {
	n := 0
	for _, g := range l.Groups {
		n += l.Prompt
		for _, c := range g {
			n += c
		}
	}
	return n
}

// UsefulFLOPs is the arithmetic a step on a load needs when each prompt is computed once:
// 6 per body parameter and token, 6·V·d per predicted token, causal attention.
func UsefulFLOPs(c model.Config, l Load) float64 { return 3 * UsefulForwardFLOPs(c, l) }

// UsefulForwardFLOPs is the share of the forward pass, a third of it.
func UsefulForwardFLOPs(c model.Config, l Load) float64 {
	d, kv := float64(c.Hidden), float64(c.KVHeads*c.HeadDim)
	body := float64(c.Layers) * (2*d*d + 2*d*kv + 3*d*float64(c.FFN))
	var tokens, predicted, pairs float64
	for _, g := range l.Groups {
		p := float64(l.Prompt)
		tokens += p
		pairs += p * p / 2
		for _, n := range g {
			c := float64(n)
			tokens += c
			predicted += c
			pairs += c*p + c*c/2
		}
	}
	return 2*body*tokens + 2*float64(c.Vocab)*d*predicted + 4*float64(c.Layers)*d*pairs
}
