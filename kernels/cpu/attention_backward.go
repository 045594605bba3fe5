package cpu

import (
	"math"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

// The backward pass recomputes the probabilities block by block from the
// log-sum-exp. Its tasks are (strip of key blocks, key head): one task owns the
// gradients of its strip's keys and values and goes over all tiles that see
// them; the gradients of the queries are kept per strip and added in the order
// of the strips. So nothing is computed twice and no two tasks add to one place.

// stripsOf returns the number of strips: enough tasks for the cores of a small
// machine, few enough that the partial query gradients stay small.
func stripsOf(kv int) int { return max(1, (12+kv-1)/kv) }

// backwardFloats is one worker's scratch: queries, output gradients, their
// row sums, log-sum-exps, probabilities and score gradients of a block.
func backwardFloats(rows, hd int) int { return 2*rows*hd + 2*rows + 2*rows*keyBlock }

func (d *device) AttentionBackward(x kernels.AttentionBackward) {
	const op = "attention backward"
	h, kv, hd := x.H, x.KV, x.HD
	width := checkHeads(op, x.T, h, kv, hd)
	group := h / kv
	b := backward{
		hd: hd, width: width, group: group, scale: float32(1 / math.Sqrt(float64(hd))),
		dqkv: floats(op, "DQKV", x.DQKV, x.T*width), qkv: floats(op, "QKV", x.QKV, x.T*width),
		dout: floats(op, "DOut", x.DOut, x.T*h*hd), lse: floats(op, "LSE", x.LSE, x.T*h),
		h: h, kv: kv,
	}
	out := floats(op, "Out", x.Out, x.T*h*hd)
	l := x.Layout.(*layout)
	checkTraining(op, l, x.T)
	b.tiling = l.tile(group)
	strips := b.tiling.cut(stripsOf(kv), l.segments)
	must(x.Scratch != nil, op, "Scratch is nil")
	mark := x.Scratch.Mark()
	defer x.Scratch.Release(mark)
	most := stackedRows(group)
	mem := carver(scratch(op, x.Scratch, int(d.AttentionScratch(x.T, h, kv, hd, true)/4)))
	all := mem.take(len(d.workers) * backwardFloats(most, hd))
	b.delta, b.dq = mem.take(x.T*h), mem.take(len(strips)*x.T*h*hd)

	// Keys and queries that no segment covers get a zero gradient.
	d.Zero(x.DQKV)
	d.blocks(x.T*h, 512, func(from, to int) {
		for i := from; i < to; i++ {
			b.delta[i] = simd.Dot(b.dout[i*hd:][:hd], out[i*hd:][:hd])
		}
	})
	d.each(len(strips)*kv, func(w, task int) {
		b.strip(task/kv, task%kv, &strips[task/kv], all[w*backwardFloats(most, hd):][:backwardFloats(most, hd)], &d.workers[w].gemm)
	})
	d.each(len(b.tiling.tiles)*kv, func(_, task int) { b.reduce(strips, task/kv, task%kv) })
}

// backward is one call's operands.
type backward struct {
	h, kv, hd, group, width int
	scale                   float32
	dqkv, qkv               []float32 // [T,W]
	dout                    []float32 // [T,H*hd]
	lse, delta              []float32 // [T,H]; delta: dout·out of each head
	dq                      []float32 // [strips, KV, tokens in tile order, group, hd]
	tiling                  *tiling
}

// partial returns the strip's gradient of a tile's stacked queries.
func (b *backward) partial(strip, head int, t *tile) []float32 {
	n := b.group * b.hd
	return b.dq[((strip*b.kv+head)*b.tiling.tokens+t.at)*n:][:t.tokens*n]
}

func (b *backward) strip(s, head int, strip *strip, scratch []float32, gemm *simd.Scratch) {
	hd, group, width := b.hd, b.group, b.width
	rows := stackedRows(group)
	mem := carver(scratch)
	q, dout := mem.take(rows*hd), mem.take(rows*hd)
	lse, delta := mem.take(rows), mem.take(rows)
	prob, dscore := mem.take(rows*keyBlock), mem.take(rows*keyBlock)
	kColumn, vColumn := (b.h+head)*hd, (b.h+b.kv+head)*hd
	for i := range b.tiling.tiles {
		t := &b.tiling.tiles[i]
		if len(strip.visits[i]) == 0 {
			continue
		}
		t.stack(q, rowsAt{b.qkv, width}, head*group*hd, group*hd)
		t.stack(dout, rowsAt{b.dout, b.h * hd}, head*group*hd, group*hd)
		t.stack(lse, rowsAt{b.lse, b.h}, head*group, group)
		t.stack(delta, rowsAt{b.delta, b.h}, head*group, group)
		dq := b.partial(s, head, t)
		clear(dq)
		for _, v := range strip.visits[i] {
			from, to, n := 0, t.tokens*group, v.n
			var p part
			if v.part >= 0 {
				p = t.parts[v.part]
				from, to = (p.at+p.blind(v.own))*group, (p.at+p.n)*group
			}
			if from >= to {
				continue
			}
			m := to - from
			k, val := b.qkv[v.key*width+kColumn:], b.qkv[v.key*width+vColumn:]
			simd.SgemmSerial(false, true, m, n, hd, q[from*hd:], hd, k, width, prob, n, false, gemm)
			simd.SgemmSerial(false, true, m, n, hd, dout[from*hd:], hd, val, width, dscore, n, false, gemm)
			for r := range m {
				pr, ds := prob[r*n:][:n], dscore[r*n:][:n]
				if v.part >= 0 {
					if seen := p.seen + (from+r)/group - p.at - v.own; seen < n {
						clear(pr[seen:])
						clear(ds[seen:])
						pr, ds = pr[:seen], ds[:seen]
					}
				}
				// dscore = prob * (dprob - delta), times scale
				simd.ExpScaleShift(pr, pr, b.scale, lse[from+r])
				simd.ScaleMul(ds, ds, pr, b.scale)
				simd.Axpy(-b.scale*delta[from+r], pr, ds)
			}
			simd.SgemmSerial(true, false, n, hd, m, prob, n, dout[from*hd:], hd, b.dqkv[v.key*width+vColumn:], width, true, gemm)
			simd.SgemmSerial(true, false, n, hd, m, dscore, n, q[from*hd:], hd, b.dqkv[v.key*width+kColumn:], width, true, gemm)
			simd.SgemmSerial(false, false, m, hd, n, dscore, n, k, width, dq[from*hd:], hd, true, gemm)
		}
	}
}

// reduce adds the strips' gradients of one tile's queries, in order.
func (b *backward) reduce(strips []strip, tile, head int) {
	t, n := &b.tiling.tiles[tile], b.group*b.hd
	for s := range strips {
		if len(strips[s].visits[tile]) == 0 {
			continue
		}
		sum := b.partial(s, head, t)
		for _, p := range t.parts {
			for i := range p.n {
				row := b.dqkv[(p.q+i)*b.width+head*n:][:n]
				simd.Add(row, row, sum[(p.at+i)*n:])
			}
		}
	}
}

// checkTraining panics when a segment reaches outside the T rows, or when its
// segments have more queries than there are rows.
func checkTraining(op string, l *layout, t int) {
	queries := 0
	for i, s := range l.segments {
		must(int(s.Q+s.QLen) <= t && int(s.K+s.KLen) <= t && int(s.Prefix+s.PrefixLen) <= t, op, "segment %d is %+v of %d rows", i, s, t)
		queries += int(s.QLen)
	}
	must(queries <= t, op, "segments have %d queries, rows %d", queries, t)
}
