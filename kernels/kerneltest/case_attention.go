package kerneltest

import (
	"math"

	"trainerd/kernels"
)

// shape of an attention case: prompts with their completions.
type attentionShape struct {
	h, kv, hd int
	groups    [][]int // prompt length, then completion lengths; 0 for none
	std       float64 // of q and k: larger makes sharper softmaxes
}

// segments lays the groups out one after the other: each prompt, then its
// completions, which see it as their prefix.
func (s attentionShape) segments() (segments []kernels.Segment, t int) {
	at := int32(0)
	for _, g := range s.groups {
		prompt := at
		for i, n := range g {
			seg := kernels.Segment{Q: at, QLen: int32(n), K: at, KLen: int32(n)}
			if i > 0 {
				seg.Prefix, seg.PrefixLen = prompt, int32(g[0])
			}
			segments = append(segments, seg)
			at += int32(n)
		}
	}
	return segments, int(at)
}

// pairs is the number of (query, key) pairs.
func pairs(segments []kernels.Segment) float64 {
	n := 0.0
	for _, s := range segments {
		n += float64(s.QLen) * (float64(s.PrefixLen) + float64(s.KLen) - float64(s.QLen-1)/2)
	}
	return n
}

// scoreError is what a scaled score may be off by: a dot product of hd terms and the scale.
func scoreError(hd int, mag float64) float64 { return float64(hd+4) * u32 * mag }

// stored is the error of an intermediate that a device may keep in its compute
// type to feed a matrix unit: none beyond float32's own in float32.
func (e *env) stored() float64 {
	if e.act == kernels.F32 {
		return 0
	}
	return 2 * e.u
}

func attentionCases(e *env) {
	for _, s := range []attentionShape{
		{1, 1, 2, [][]int{{1}}, 1},
		{1, 1, 64, [][]int{{2}, {1}, {3}}, 1},
		{3, 1, 6, [][]int{{5, 1, 2}, {0, 3}, {4, 0, 7}}, 1},
		{4, 4, 16, [][]int{{130}}, 2},
		{9, 3, 64, [][]int{{65, 13, 1, 31}}, 1},
		{6, 2, 64, [][]int{{33, 64, 65}, {1, 1}, {70}}, 3},
		{7, 1, 32, [][]int{{40, 29, 8}}, 1},
		{2, 1, 128, [][]int{{100, 57, 3}}, 1},
		{2, 2, 80, [][]int{{300, 20}}, 1},
		{1, 1, 8, [][]int{{700, 3, 150, 150}}, 4},
		{14, 2, 64, [][]int{{600, 200, 100, 50}, {800}}, 1},
		{28, 4, 128, [][]int{{2048, 500, 500, 500, 500}}, 1},
		{4, 1, 64, [][]int{{32768}}, 1},
		{2, 1, 128, [][]int{{32000, 300, 700}}, 1},
	} {
		segments, t := s.segments()
		e.sub(pairs(segments)*float64(s.h*s.hd)*12, label("h%d.%d.%d/%v", s.h, s.kv, s.hd, s.groups), func(e *env) { e.attention(s, segments, t) })
	}
	e.sub(1, "nan", func(e *env) {
		s := attentionShape{2, 1, 8, [][]int{{6}, {5}}, 1}
		segments, t := s.segments()
		w := (s.h + 2*s.kv) * s.hd
		qkv := e.normal(e.act, t*w, 1)
		qkv[2*w+1] = math.NaN() // a query of row 2
		out, lse := e.forward(qkv, segments, t, s)
		e.nan("head 0 of row 2", out[2*s.h*s.hd:][:s.hd])
		e.nan("log-sum-exp of row 2", lse[2*s.h:][:1])
		for _, v := range out[6*s.h*s.hd:] {
			if math.IsNaN(v) {
				e.Fatal("NaN in a segment that does not hold it")
			}
		}
	})
}

// strided views packed rows q|k|v.
func stridedQKV(b kernels.Buffer, h, kv, hd int) (q, k, v kernels.Strided) {
	w := (h + 2*kv) * hd
	return kernels.Strided{Buf: b, Stride: w}, kernels.Strided{Buf: b, Off: h * hd, Stride: w}, kernels.Strided{Buf: b, Off: (h + kv) * hd, Stride: w}
}

func (e *env) forward(qkv []float64, segments []kernels.Segment, t int, s attentionShape) (out, lse []float64) {
	b := e.load(e.act, qkv)
	o, l := e.poisoned(e.act, t*s.h*s.hd), e.poisoned(kernels.F32, t*s.h)
	q, k, v := stridedQKV(b, s.h, s.kv, s.hd)
	e.run(func(dev kernels.Device, a kernels.Arena) {
		dev.Attention(kernels.Attention{Out: o, LSE: l, Q: q, K: k, V: v, PK: k, PV: v, Layout: dev.Layout(a, segments), T: t, H: s.h, KV: s.kv, HD: s.hd, Scratch: a})
	})
	return e.read(o), e.read(l)
}

func (e *env) attention(s attentionShape, segments []kernels.Segment, t int) {
	w := (s.h + 2*s.kv) * s.hd
	qkv := e.normal(e.act, t*w, 1)
	for i := range qkv {
		if i%w < (s.h+s.kv)*s.hd {
			qkv[i] = round(e.act, qkv[i]*s.std)
		}
	}
	out, lse := e.forward(qkv, segments, t, s)
	ref := packed(qkv, segments, s.h, s.kv, s.hd)

	// Of long micro-batches a sample of query rows and of keys is checked.
	type query struct {
		s       kernels.Segment
		i, head int
	}
	var queries []query
	for _, seg := range segments {
		for i := range int(seg.QLen) {
			for head := range s.h {
				queries = append(queries, query{seg, i, head})
			}
		}
	}
	sample := e.picks(len(queries), int(max(20, 5e7/(pairs(segments)/float64(t)*float64(s.hd)))))
	mostScore, mostLSE, mostKeys := 0.0, 0.0, 0
	for _, x := range sample {
		q := queries[x]
		r := ref.row(q.s, q.i, q.head)
		mostScore, mostLSE, mostKeys = max(mostScore, r.scoreMag), max(mostLSE, math.Abs(r.lse)), max(mostKeys, len(r.rows))
		// Each probability is off by twice the error of a score (its own and the
		// normaliser's); exponentials, sums over the keys and rescaling by blocks
		// add their roundings; the probabilities may be stored for the second product.
		delta := scoreError(s.hd, r.scoreMag)
		want, tol := values(r.out, 2*delta+float64(2*len(r.rows)+16)*u32+e.stored(), e.u)
		at := (int(q.s.Q)+q.i)*s.h + q.head
		e.compare(label("out of row %d, head %d", int(q.s.Q)+q.i, q.head), out[at*s.hd:][:s.hd], want, tol)
		e.compare(label("log-sum-exp of row %d, head %d", int(q.s.Q)+q.i, q.head), lse[at:][:1], []float64{r.lse},
			[]float64{delta + float64(len(r.rows)+8)*u32 + 4*u32*math.Abs(r.lse)})
	}

	// The backward pass is judged on the stored outputs that it is given.
	dout := e.normal(e.act, t*s.h*s.hd, 1)
	d := e.poisoned(e.act, t*w)
	bo, bl, bd, bq := e.load(e.act, out), e.load(kernels.F32, lse), e.load(e.act, dout), e.load(e.act, qkv)
	e.run(func(dev kernels.Device, a kernels.Arena) {
		dev.AttentionBackward(kernels.AttentionBackward{
			DQKV: d, DOut: bd, Out: bo, LSE: bl, QKV: bq, Layout: dev.Layout(a, segments), T: t, H: s.h, KV: s.kv, HD: s.hd, Scratch: a,
		})
	})
	got := e.read(d)
	g := attentionGrad{attention: ref, dout: dout, out: out, lse: lse}
	// p is off by the error of score - lse; dprob and delta are dot products of hd
	// terms; the score gradients are summed over keys (dq) or queries (dk, dv).
	rel := scoreError(s.hd, mostScore) + 4*u32*mostLSE + float64(s.hd+12)*u32 + e.stored()
	for _, x := range sample {
		q := queries[x]
		row := int(q.s.Q) + q.i
		want, tol := values(g.dq(q.s, q.i, q.head), rel+float64(mostKeys+8)*u32, e.u)
		e.compare(label("dq of row %d, head %d", row, q.head), got[row*w+q.head*s.hd:][:s.hd], want, tol)
	}
	for _, x := range e.picks(t*s.kv, int(max(10, 5e7/(pairs(segments)/float64(t)*float64(s.hd*s.h))))) {
		row, head := x/s.kv, x%s.kv
		dk, dv := g.dkv(int32(row), head)
		terms := float64(t*s.h/s.kv + 8)
		want, tol := values(dk, rel+terms*u32, e.u)
		e.compare(label("dk of row %d, head %d", row, head), got[row*w+(s.h+head)*s.hd:][:s.hd], want, tol)
		want, tol = values(dv, rel+terms*u32, e.u)
		e.compare(label("dv of row %d, head %d", row, head), got[row*w+(s.h+s.kv+head)*s.hd:][:s.hd], want, tol)
	}
}

// decodeCases: queries of one token (or a few), own keys in a cache with slots,
// prefixes in another matrix with another stride, shared by runs of sequences.
func decodeCases(e *env) {
	for _, c := range []struct {
		h, kv, hd, sequences, prompts, prefix, own, queries int
	}{
		{1, 1, 2, 1, 1, 1, 1, 1},
		{9, 3, 64, 7, 1, 77, 9, 1},
		{4, 2, 16, 33, 5, 40, 21, 1},
		{2, 1, 128, 5, 2, 300, 3, 1},
		{3, 3, 10, 6, 2, 0, 12, 1},
		{4, 1, 32, 6, 2, 25, 12, 4},
		{14, 2, 64, 64, 4, 2000, 500, 1},
	} {
		e.sub(float64(c.sequences*(c.prefix+c.own)*c.h*c.hd*4), label("h%d.%d.%d/%dof%d/%d+%d/%d", c.h, c.kv, c.hd, c.sequences, c.prompts, c.prefix, c.own, c.queries), func(e *env) {
			t, columns := c.sequences*c.queries, c.kv*c.hd
			slot := c.own + 2
			qStride, kStride, pStride := c.h*c.hd+3, 2*columns+1, columns+5
			q, cache, prefix := e.normal(e.act, t*qStride+1, 1), e.normal(e.act, c.sequences*slot*kStride+2, 1), e.normal(e.act, 2*c.prompts*(c.prefix+1)*pStride, 1)
			pv := c.prompts * (c.prefix + 1) * pStride
			var segments []kernels.Segment
			for i := range c.sequences {
				prompt := i * c.prompts / c.sequences
				segments = append(segments, kernels.Segment{
					Q: int32(i * c.queries), QLen: int32(c.queries), K: int32(i * slot), KLen: int32(max(c.queries, c.own-i%3)),
					Prefix: int32(prompt * (c.prefix + 1)), PrefixLen: int32(max(0, c.prefix-prompt/2)), // neighbours of equal and of other length
				})
			}
			ref := attention{
				h: c.h, kv: c.kv, hd: c.hd, t: t, segments: segments,
				q: hostRows{q, 1, qStride}, k: hostRows{cache, 2, kStride}, v: hostRows{cache, 2 + columns, kStride},
				pk: hostRows{prefix, 0, pStride}, pv: hostRows{prefix, pv, pStride},
			}
			bq, bc, bp := e.load(e.act, q), e.load(e.act, cache), e.load(e.act, prefix)
			out := e.poisoned(e.act, t*c.h*c.hd)
			e.run(func(dev kernels.Device, a kernels.Arena) {
				dev.Attention(kernels.Attention{
					Out: out, T: t, H: c.h, KV: c.kv, HD: c.hd, Layout: dev.Layout(a, segments), Scratch: a,
					Q: kernels.Strided{Buf: bq, Off: 1, Stride: qStride},
					K: kernels.Strided{Buf: bc, Off: 2, Stride: kStride}, V: kernels.Strided{Buf: bc, Off: 2 + columns, Stride: kStride},
					PK: kernels.Strided{Buf: bp, Stride: pStride}, PV: kernels.Strided{Buf: bp, Off: pv, Stride: pStride},
				})
			})
			got := e.read(out)
			for _, s := range segments {
				for i := range int(s.QLen) {
					for head := range c.h {
						r := ref.row(s, i, head)
						want, tol := values(r.out, 2*scoreError(c.hd, r.scoreMag)+float64(2*len(r.rows)+16)*u32+e.stored(), e.u)
						at := (int(s.Q)+i)*c.h + head
						e.compare(label("out of row %d, head %d", int(s.Q)+i, head), got[at*c.hd:][:c.hd], want, tol)
					}
				}
			}
		})
	}
}
