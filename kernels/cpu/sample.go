package cpu

import (
	"cmp"
	"math"
	"slices"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

func (d *device) DrawScratch(n, dim, v int) int64 {
	return kernels.Round(int64(headChunk(n, v))*int64(v)*4, alignment)
}

func (d *device) Sample(x kernels.Draw) {
	const op = "sample"
	n, dim, v := x.N, x.D, x.V
	must(n >= 0 && dim > 0 && v > 0 && x.Temperature >= 0 && x.TopP > 0 && x.TopP <= 1, op,
		"N %d d %d V %d temperature %v top-p %v", n, dim, v, x.Temperature, x.TopP)
	hidden, w := floats(op, "Hidden", x.Hidden, n*dim), floats(op, "W", x.W, v*dim)
	tokens, logProb := ints(op, "Tokens", x.Tokens, n), floats(op, "LogProb", x.LogProb, n)
	u := optional(op, "U", x.U, n)
	must(u != nil || x.Temperature == 0, op, "U is nil and temperature %v", x.Temperature)
	if n == 0 {
		return
	}
	must(x.Scratch != nil, op, "Scratch is nil")
	mark := x.Scratch.Mark()
	defer x.Scratch.Release(mark)
	chunk := headChunk(n, v)
	logits := scratch(op, x.Scratch, chunk*v)
	for from := 0; from < n; from += chunk {
		m := min(chunk, n-from)
		d.gemm(false, true, m, v, dim, hidden[from*dim:][:m*dim], w, logits[:m*v], false)
		d.each(m, func(_, i int) {
			z := logits[i*v:][:v]
			if x.Temperature == 0 {
				tokens[from+i], logProb[from+i] = greedyRow(z)
				return
			}
			tokens[from+i], logProb[from+i] = drawRow(z, u[from+i], 1/x.Temperature, x.TopP)
		})
	}
}

// greedyRow returns the id of the greatest logit (the lowest on a tie) and its
// log-prob at temperature 1. A row with a NaN gives id 0 and NaN.
func greedyRow(z []float32) (int32, float32) {
	top := simd.Max(z)
	best := max(0, slices.Index(z, top))
	return int32(best), float32(-math.Log(float64(simd.ExpSum(z, top, 1))))
}

// drawRow draws one id from softmax(z*scale), overwriting z with exp(z*scale - max).
//
// The nucleus is the shortest run of ids, by falling probability (ties: lower
// id first), whose mass reaches topP. The cumulative sum that u inverts runs
// over the nucleus in id order, so that topP 1 needs no sort. A row with a NaN
// gives id 0 and NaN.
func drawRow(z []float32, u, scale, topP float32) (int32, float32) {
	simd.ExpScaleShift(z, z, scale, simd.Max(z)*scale)
	sum := simd.Sum(z)
	if math.IsNaN(sum) {
		return 0, float32(sum)
	}
	var id int32
	if topP < 1 {
		id = invertNucleus(z, nucleus(z, sum, topP), float64(u))
	} else {
		id = invert(z, float64(u)*sum)
	}
	return id, float32(math.Log(float64(z[id])) - math.Log(sum))
}

// invert returns the first id where the cumulative sum of e exceeds aim, or the
// last id of positive mass when rounding leaves none. Whole blocks are skipped by their sum.
func invert(e []float32, aim float64) int32 {
	const block = 1024
	seen, last := 0.0, int32(0)
	for from := 0; from < len(e); from += block {
		b := e[from:min(from+block, len(e))]
		s := simd.Sum(b)
		if seen+s <= aim && from+block < len(e) {
			seen += s
			continue
		}
		for j, a := range b {
			if a > 0 {
				seen, last = seen+float64(a), int32(from+j)
				if seen > aim {
					return last
				}
			}
		}
	}
	return last
}

// nucleus returns the ids of the nucleus in ascending order.
func nucleus(e []float32, sum float64, topP float32) []int32 {
	// What is less likely than (1-topP)/V cannot matter: all of it together
	// weighs less than 1-topP, so the rest alone reaches topP. The margin
	// covers rounding. This leaves a few ids to sort.
	floor := float32((1 - float64(topP)) * sum / float64(len(e)) * 0.999)
	var ids []int32
	for j, a := range e {
		if a >= floor && a > 0 {
			ids = append(ids, int32(j))
		}
	}
	slices.SortFunc(ids, func(a, b int32) int {
		return cmp.Or(cmp.Compare(e[b], e[a]), cmp.Compare(a, b))
	})
	mass := 0.0
	for i, j := range ids {
		if mass += float64(e[j]); mass >= float64(topP)*sum {
			ids = ids[:i+1]
			break
		}
	}
	slices.Sort(ids)
	return ids
}

// invertNucleus is invert over some ids, with u in [0,1).
func invertNucleus(e []float32, ids []int32, u float64) int32 {
	mass := 0.0
	for _, j := range ids {
		mass += float64(e[j])
	}
	seen := 0.0
	for _, j := range ids {
		if seen += float64(e[j]); seen > u*mass {
			return j
		}
	}
	return ids[len(ids)-1]
}
