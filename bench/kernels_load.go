package bench

import (
	"fmt"

	"trainerd/kernels"
)

// packing is a load as one micro-batch: each prompt once, its completions
// behind it without their last token, as a step packs them.
type packing struct {
	prompt    int
	segments  []kernels.Segment
	positions []int32
	tokens    int       // T
	predicted int       // N: every completion token
	groups    [][]int32 // for each group the rows that predict, a prompt's last row once per completion
	pairs     float64   // of query and key, over all segments
	members   int       // completions
}

// pack takes the leading groups of a load that fit into a number of tokens.
func pack(l Load, most int) (packing, error) {
	p := packing{prompt: l.Prompt}
	for _, g := range l.Groups {
		need := l.Prompt
		for _, n := range g {
			need += n - 1
		}
		if p.tokens+need > most {
			break
		}
		first := int32(p.tokens)
		p.add(kernels.Segment{Q: first, QLen: int32(l.Prompt), K: first, KLen: int32(l.Prompt)}, 0)
		var rows []int32
		for _, n := range g {
			at := int32(p.tokens)
			rows = append(rows, first+int32(l.Prompt)-1)
			for i := range n - 1 {
				rows = append(rows, at+int32(i))
			}
			if n > 1 {
				p.add(kernels.Segment{Q: at, QLen: int32(n - 1), K: at, KLen: int32(n - 1), Prefix: first, PrefixLen: int32(l.Prompt)}, l.Prompt)
			}
			p.members++
			p.predicted += n
		}
		p.groups = append(p.groups, rows)
	}
	if len(p.groups) == 0 {
		return p, fmt.Errorf("max-tokens is %d, expected room for the first group of load %s", most, l.Name)
	}
	return p, nil
}

func (p *packing) add(s kernels.Segment, position int) {
	p.segments = append(p.segments, s)
	n := float64(s.QLen)
	p.pairs += n*float64(s.PrefixLen) + n*(n+1)/2
	for i := range s.QLen {
		p.positions = append(p.positions, int32(position)+i)
	}
	p.tokens += int(s.QLen)
}
