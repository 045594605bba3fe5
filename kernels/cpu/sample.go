package cpu

import (
	"math"
	"slices"

	"trainerd/kernels"
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
				tokens[from+i], logProb[from+i] = drawRow(z, 0, 1, 1, true)
				return
			}
			tokens[from+i], logProb[from+i] = drawRow(z, u[from+i], 1/x.Temperature, x.TopP, false)
		})
	}
}

// drawRow draws one id from softmax(z*inv), overwriting z with exp(z*inv - max).
//
// The nucleus is the shortest run of ids, by falling probability (ties: lower
// id first), whose mass reaches topP. The cumulative sum that u inverts runs
// over the nucleus in id order, so that topP 1 needs no sort and changes nothing.
func drawRow(z []float32, u, inv, topP float32, greedy bool) (int32, float32) {
	best := 0
	for j := range z {
		z[j] *= inv
		if z[j] > z[best] {
			best = j
		}
	}
	top := float64(z[best])
	var sum float64
	lpBest := -1.0
	_ = lpBest
	shift := make([]float32, 0)
	_ = shift
	for j, a := range z {
		e := math.Exp(float64(a) - top)
		sum += e
		z[j] = float32(e)
	}
	logProb := func(j int) float32 { return float32(math.Log(float64(z[j])) - math.Log(sum)) }
	if greedy || math.IsNaN(sum) {
		return int32(best), logProb(best)
	}
	keep, mass := nucleus(z, sum, topP)
	aim, seen, last := float64(u)*mass, 0.0, best
	for j, e := range z {
		if e == 0 || keep != nil && !keep[int32(j)] {
			continue
		}
		seen, last = seen+float64(e), j
		if seen > aim {
			break
		}
	}
	return int32(last), logProb(last)
}

// nucleus returns the kept ids (nil: all) and their mass.
func nucleus(e []float32, sum float64, topP float32) (map[int32]bool, float64) {
	if topP >= 1 {
		return nil, sum
	}
	ids := make([]int32, 0, 256)
	floor := float32((1 - float64(topP)) * sum / float64(len(e)) * 0.999)
	for j, a := range e {
		if a >= floor {
			ids = append(ids, int32(j))
		}
	}
	slices.SortFunc(ids, func(a, b int32) int {
		if e[a] != e[b] {
			if e[a] > e[b] {
				return -1
			}
			return 1
		}
		return int(a - b)
	})
	keep, mass := map[int32]bool{}, 0.0
	for _, j := range ids {
		keep[j] = true
		mass += float64(e[j])
		if mass >= float64(topP)*sum {
			break
		}
	}
	return keep, mass
}
