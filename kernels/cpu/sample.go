package cpu

import (
	"math"
	"slices"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

func (d *device) DrawScratch(n, dim, v int) int64 { return logitBytes(n, v) }

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
		d.each(m, func(w, i int) {
			z := logits[i*v:][:v]
			if x.Temperature == 0 {
				tokens[from+i], logProb[from+i] = greedyRow(z)
				return
			}
			tokens[from+i], logProb[from+i] = drawRow(&d.workers[w], z, u[from+i], 1/x.Temperature, x.TopP)
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
// over the nucleus in id order, so that topP 1 needs no nucleus at all. A row
// with a NaN gives id 0 and NaN.
func drawRow(w *worker, z []float32, u, scale, topP float32) (int32, float32) {
	simd.ExpScaleShift(z, z, scale, simd.Max(z)*scale)
	sum := simd.Sum(z)
	if math.IsNaN(sum) {
		return 0, float32(sum)
	}
	var id int32
	if topP < 1 {
		id = w.nucleus(z, sum, topP).invert(z, float64(u))
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

// nucleus is the ids that are likelier than that of the given last one, and
// those as likely up to it.
type nucleus struct {
	least float32 // e[last]
	last  int32
	mass  float64
}

// Buckets of a nucleus search: what e in [0,1] has of its exponent and its first
// five bits, which order like the numbers do.
const (
	bucketShift = 18
	buckets     = 0x3f800000>>bucketShift + 1 // the last one holds exp(0) = 1
)

func bucketOf(e float32) int { return min(int(math.Float32bits(e)>>bucketShift), buckets-1) }

// nucleus finds the shortest run without sorting the vocabulary: it adds up
// buckets of similar values from the top and sorts only the one where the mass
// is reached.
func (w *worker) nucleus(e []float32, sum float64, topP float32) nucleus {
	if w.mass == nil {
		w.mass = make([]float64, buckets)
	}
	clear(w.mass)
	for _, a := range e {
		w.mass[bucketOf(a)] += float64(a)
	}
	aim, above, b := float64(topP)*sum, 0.0, buckets-1
	for b > 0 && above+w.mass[b] < aim {
		above += w.mass[b]
		b--
	}
	w.ids = w.ids[:0]
	for j, a := range e {
		if a > 0 && bucketOf(a) == b {
			w.ids = append(w.ids, int32(j))
		}
	}
	slices.SortFunc(w.ids, func(x, y int32) int {
		if e[x] != e[y] {
			if e[x] > e[y] {
				return -1
			}
			return 1
		}
		return int(x - y)
	})
	n := nucleus{mass: above}
	for _, j := range w.ids {
		n.least, n.last = e[j], j
		if n.mass += float64(e[j]); n.mass >= aim {
			break
		}
	}
	return n
}

// invert returns the first id of the nucleus, in id order, where the cumulative
// sum exceeds u of its mass, with u in [0,1).
func (n nucleus) invert(e []float32, u float64) int32 {
	seen, id := 0.0, n.last
	for j, a := range e {
		if a < n.least || a == n.least && int32(j) > n.last {
			continue
		}
		seen, id = seen+float64(a), int32(j)
		if seen > u*n.mass {
			break
		}
	}
	return id
}
