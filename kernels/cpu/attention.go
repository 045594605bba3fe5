package cpu

import (
	"math"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

// Attention follows FlashAttention-2 (Dao 2023, arXiv 2307.08691) on tiles that
// suit a small Gemm: the queries of about 64 tokens, all query heads of one key
// head stacked, row (token, head). A task is one tile and one key head. Tiles
// share a prefix, so decoding many completions of one prompt reads its keys
// once for all of them.

// forwardKeys is the most keys of one block of scores.
const forwardKeys = 256

// fewRows is how many query rows a block of keys serves at most that is asked for
// ahead: with more, the arithmetic hides the fetching.
const fewRows = 64

// forwardFloats is one worker's scratch: scores, queries, output, maxima and sums.
func forwardFloats(rows, hd int) int { return rows*forwardKeys + 2*rows*hd + 2*rows }

// stackedRows is the most rows of a tile.
func stackedRows(group int) int { return max(tileRows/group, 1) * group }

func (d *device) AttentionScratch(t, h, kv, hd int, backward bool) int64 {
	floats := len(d.workers) * forwardFloats(stackedRows(h/kv), hd)
	if backward {
		floats = len(d.workers)*backwardFloats(stackedRows(h/kv), hd) + t*h + stripsOf(kv)*t*h*hd
	}
	return kernels.Round(4*int64(floats), alignment)
}

// carver hands out consecutive pieces of one allocation.
type carver []float32

func (c *carver) take(n int) []float32 {
	x := (*c)[:n:n]
	*c = (*c)[n:]
	return x
}

func (d *device) Attention(x kernels.Attention) {
	const op = "attention"
	h, kv, hd := x.H, x.KV, x.HD
	checkHeads(op, x.T, h, kv, hd)
	group := h / kv
	out, lse := floats(op, "Out", x.Out, x.T*h*hd), optional(op, "LSE", x.LSE, x.T*h)
	if x.PK.Buf == nil {
		x.PK, x.PV = x.K, x.V
	}
	l := x.Layout.(*layout)
	q := matrix(op, "Q", x.Q)
	own := keysValues{matrix(op, "K", x.K), matrix(op, "V", x.V)}
	prefix := keysValues{matrix(op, "PK", x.PK), matrix(op, "PV", x.PV)}
	for i, s := range l.segments {
		must(int(s.Q+s.QLen) <= x.T, op, "segment %d is %+v of %d query rows", i, s, x.T)
		q.covers(op, "Q", i, s.Q, s.QLen, h*hd)
		own.k.covers(op, "K", i, s.K, s.KLen, kv*hd)
		own.v.covers(op, "V", i, s.K, s.KLen, kv*hd)
		prefix.k.covers(op, "PK", i, s.Prefix, s.PrefixLen, kv*hd)
		prefix.v.covers(op, "PV", i, s.Prefix, s.PrefixLen, kv*hd)
	}
	tiles := l.tile(group)
	must(x.Scratch != nil, op, "Scratch is nil")
	mark := x.Scratch.Mark()
	defer x.Scratch.Release(mark)
	most := stackedRows(group)
	all := scratch(op, x.Scratch, len(d.workers)*forwardFloats(most, hd))
	scale := float32(1 / math.Sqrt(float64(hd)))
	d.each(len(tiles.tiles)*kv, func(w, task int) {
		t, head := &tiles.tiles[tiles.order[task/kv]], task%kv
		mem := carver(all[w*forwardFloats(most, hd):][:forwardFloats(most, hd)])
		f := flash{
			scores: mem.take(most * forwardKeys), q: mem.take(most * hd), out: mem.take(most * hd),
			top: mem.take(most), sum: mem.take(most),
			hd: hd, scale: scale, gemm: &d.workers[w].gemm,
		}
		f.start(t.tokens * group)
		t.stack(f.q, q, head*group*hd, group*hd)
		for key := 0; key < t.prefixLen; key += forwardKeys {
			f.block(prefix, head*hd, t.prefix+key, min(forwardKeys, t.prefixLen-key), 0, t.tokens*group, nil)
		}
		for _, p := range t.parts {
			for key := 0; key < p.keys(); key += forwardKeys {
				blind := p.blind(key)
				f.block(own, head*hd, p.k+key, min(forwardKeys, p.keys()-key), (p.at+blind)*group, (p.at+p.n)*group,
					func(row int) int { return p.seen + row/group - p.at - key })
			}
		}
		f.finish()
		for _, p := range t.parts {
			for i := range p.n {
				row := (p.at + i) * group
				copy(out[(p.q+i)*h*hd+head*group*hd:][:group*hd], f.out[row*hd:])
				if x.LSE != nil {
					copy(lse[(p.q+i)*h+head*group:][:group], f.top[row:])
				}
			}
		}
	})
}

// rowsAt is a matrix with rows a stride apart.
type rowsAt struct {
	x      []float32
	stride int
}

func matrix(op, name string, s kernels.Strided) rowsAt {
	x := anyFloats(op, name, s.Buf)
	must(s.Off >= 0 && s.Off <= len(x) && s.Stride > 0, op, "%s: offset %d, stride %d of %d elements", name, s.Off, s.Stride, len(x))
	return rowsAt{x[s.Off:], s.Stride}
}

// from returns the matrix from a row and column on.
func (m rowsAt) from(row, column int) []float32 { return m.x[row*m.stride+column:] }

// covers panics when the matrix does not hold a segment's rows [from,from+n).
func (m rowsAt) covers(op, name string, segment int, from, n int32, columns int) {
	must(n == 0 || int(from+n-1)*m.stride+columns <= len(m.x), op,
		"segment %d: rows [%d,%d) of %s end past its %d elements (stride %d)", segment, from, from+n, name, len(m.x), m.stride)
}

type keysValues struct{ k, v rowsAt }

// stack copies the tile's rows of m, n columns from the given one on, one after the other.
func (t *tile) stack(dst []float32, m rowsAt, column, n int) {
	for _, p := range t.parts {
		for i := range p.n {
			copy(dst[(p.at+i)*n:][:n], m.from(p.q+i, column))
		}
	}
}

// flash is the online softmax of one tile and key head.
type flash struct {
	scores []float32 // [rows, keys of a block]
	q, out []float32 // [rows, hd]
	top    []float32 // [rows] greatest scaled score so far; after finish the log-sum-exp
	sum    []float32 // [rows] sum of exp(score-top) so far
	rows   int
	hd     int
	scale  float32
	gemm   *simd.Scratch
}

func (f *flash) start(rows int) {
	f.rows = rows
	clear(f.out[:rows*f.hd])
	clear(f.sum[:rows])
	for i := range rows {
		f.top[i] = float32(math.Inf(-1))
	}
}

// block lets rows [from,to) attend to n keys. seen gives how many of them a row
// sees (more than n means all); nil: all.
func (f *flash) block(m keysValues, column, key, n, from, to int, seen func(row int) int) {
	if from >= to {
		return
	}
	hd := f.hd
	if to-from <= fewRows { // decoding: the time is that of fetching keys and values
		simd.Prefetch(m.k.from(key, column), m.k.stride, n, hd)
		simd.Prefetch(m.v.from(key, column), m.v.stride, n, hd)
	}
	simd.SgemmSerial(false, true, to-from, n, hd, f.q[from*hd:], hd, m.k.from(key, column), m.k.stride, f.scores, n, false, f.gemm)
	for r := from; r < to; r++ {
		row := f.scores[(r-from)*n:][:n]
		if seen != nil {
			if s := seen(r); s < n {
				clear(row[s:])
				row = row[:s]
			}
		}
		top := simd.Max(row) * f.scale
		if f.top[r] < top || top != top {
			// exp(-Inf - top) is 0: the first block scales an empty sum.
			shrink := float32(math.Exp(float64(f.top[r] - top)))
			f.sum[r] *= shrink
			if shrink != 0 {
				simd.Scale(f.out[r*hd:][:hd], f.out[r*hd:], shrink)
			}
			f.top[r] = top
		}
		f.sum[r] += simd.ExpScaleShift(row, row, f.scale, f.top[r])
	}
	simd.SgemmSerial(false, false, to-from, hd, n, f.scores, n, m.v.from(key, column), m.v.stride, f.out[from*hd:], hd, true, f.gemm)
}

// finish divides by the sums and turns top into the log-sum-exp. A row that saw
// no key has output 0 and log-sum-exp -Inf.
func (f *flash) finish() {
	for r := range f.rows {
		if f.sum[r] == 0 {
			continue
		}
		row := f.out[r*f.hd:][:f.hd]
		simd.Scale(row, row, 1/f.sum[r])
		f.top[r] += float32(math.Log(float64(f.sum[r])))
	}
}
