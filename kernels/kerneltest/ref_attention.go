package kerneltest

import (
	"math"

	"trainerd/kernels"
)

// attention is one attention problem on the host. Rows are [rows, stride] with
// head j at columns [off+j*hd, off+(j+1)*hd).
type attention struct {
	h, kv, hd       int
	t               int // rows of q
	segments        []kernels.Segment
	q, k, v, pk, pv hostRows
}

type hostRows struct {
	x           []float64
	off, stride int
}

func (m hostRows) head(row int32, head, hd int) []float64 {
	return m.x[m.off+int(row)*m.stride+head*hd:][:hd]
}

// packed is an attention problem over rows q|k|v, as in training.
func packed(qkv []float64, segments []kernels.Segment, h, kv, hd int) attention {
	w := (h + 2*kv) * hd
	k, v := hostRows{qkv, h * hd, w}, hostRows{qkv, (h + kv) * hd, w}
	return attention{h: h, kv: kv, hd: hd, t: len(qkv) / w, segments: segments, q: hostRows{qkv, 0, w}, k: k, v: v, pk: k, pv: v}
}

// visible lists what query i of a segment sees: key rows, and whether they are the prefix's.
func visible(s kernels.Segment, i int) (rows []int32, prefix int) {
	for j := range s.PrefixLen {
		rows = append(rows, s.Prefix+j)
	}
	for j := int32(0); j < s.KLen && j <= int32(i)+s.KLen-s.QLen; j++ {
		rows = append(rows, s.K+j)
	}
	return rows, int(s.PrefixLen)
}

// attended is one query row and head with everything that its error depends on.
type attended struct {
	rows     []int32
	prefix   int
	p        []float64
	out      []value
	lse      float64
	scoreMag float64 // greatest sum of |q_c*k_c|*scale
}

func dot64(a, b []float64) (v, mag float64) {
	for i, x := range a {
		v += x * b[i]
		mag += math.Abs(x * b[i])
	}
	return v, mag
}

func (a attention) keys(s kernels.Segment, n, prefix, head int, rows []int32) (k, v []float64) {
	kh := head / (a.h / a.kv)
	if n < prefix {
		return a.pk.head(rows[n], kh, a.hd), a.pv.head(rows[n], kh, a.hd)
	}
	return a.k.head(rows[n], kh, a.hd), a.v.head(rows[n], kh, a.hd)
}

// row is the reference of one query row and head.
func (a attention) row(s kernels.Segment, i, head int) attended {
	r := attended{out: make([]value, a.hd), lse: math.Inf(-1)}
	r.rows, r.prefix = visible(s, i)
	r.p = make([]float64, len(r.rows))
	if len(r.rows) == 0 {
		return r
	}
	scale, top := 1/math.Sqrt(float64(a.hd)), math.Inf(-1)
	q := a.q.head(s.Q+int32(i), head, a.hd)
	for n := range r.rows {
		k, _ := a.keys(s, n, r.prefix, head, r.rows)
		z, mag := dot64(q, k)
		r.p[n], r.scoreMag = z*scale, max(r.scoreMag, mag*scale)
		top = max(top, z*scale)
	}
	sum := 0.0
	for _, z := range r.p {
		sum += math.Exp(z - top)
	}
	r.lse = top + math.Log(sum)
	for n, z := range r.p {
		r.p[n] = math.Exp(z - r.lse)
		_, v := a.keys(s, n, r.prefix, head, r.rows)
		for c, x := range v {
			r.out[c].v += r.p[n] * x
			r.out[c].mag += r.p[n] * math.Abs(x)
		}
	}
	return r
}

// attentionGrad is the input of the backward pass beside the problem itself.
type attentionGrad struct {
	attention
	dout, out []float64 // [T,H*hd]
	lse       []float64 // [T,H]
}

// pair is one query and key: probability, score gradient and the magnitude of the latter's terms.
func (g attentionGrad) pair(q, k, v []float64, row int32, head int) (p, ds, mag float64) {
	at := int(row)*g.h + head
	do, o := g.dout[at*g.hd:][:g.hd], g.out[at*g.hd:][:g.hd]
	scale := 1 / math.Sqrt(float64(g.hd))
	z, _ := dot64(q, k)
	p = math.Exp(z*scale - g.lse[at])
	dp, m1 := dot64(do, v)
	delta, m2 := dot64(do, o)
	return p, scale * p * (dp - delta), scale * p * (m1 + m2)
}

// dq is the gradient of one query row and head.
func (g attentionGrad) dq(s kernels.Segment, i, head int) []value {
	out := make([]value, g.hd)
	rows, prefix := visible(s, i)
	q := g.q.head(s.Q+int32(i), head, g.hd)
	for n := range rows {
		k, v := g.keys(s, n, prefix, head, rows)
		_, ds, mag := g.pair(q, k, v, s.Q+int32(i), head)
		for c, x := range k {
			out[c].v += ds * x
			out[c].mag += mag * math.Abs(x)
		}
	}
	return out
}

// dkv is the gradient of one key row and key head, over all queries that see it.
func (g attentionGrad) dkv(row int32, kh int) (dk, dv []value) {
	dk, dv = make([]value, g.hd), make([]value, g.hd)
	k, v := g.k.head(row, kh, g.hd), g.v.head(row, kh, g.hd)
	for _, s := range g.segments {
		for i := range int(s.QLen) {
			times := 0
			if row >= s.Prefix && row < s.Prefix+s.PrefixLen {
				times++
			}
			if j := row - s.K; j >= 0 && j < s.KLen && j <= int32(i)+s.KLen-s.QLen {
				times++
			}
			if times == 0 {
				continue
			}
			for head := kh * (g.h / g.kv); head < (kh+1)*(g.h/g.kv); head++ {
				q := g.q.head(s.Q+int32(i), head, g.hd)
				p, ds, mag := g.pair(q, k, v, s.Q+int32(i), head)
				do := g.dout[(int(s.Q)+i)*g.h*g.hd+head*g.hd:][:g.hd]
				for c := range dk {
					dk[c].v += float64(times) * ds * q[c]
					dk[c].mag += float64(times) * mag * math.Abs(q[c])
					dv[c].v += float64(times) * p * do[c]
					dv[c].mag += float64(times) * p * math.Abs(do[c])
				}
			}
		}
	}
	return dk, dv
}
