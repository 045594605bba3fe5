package cpu

import (
	"math"

	"trainerd/kernels"
	"trainerd/kernels/internal/seal"
)

type layout struct {
	seal.Mark
	segments []kernels.Segment
}

func (l *layout) Segments() []kernels.Segment { return l.segments }

func (d *device) Layout(_ kernels.Arena, segments []kernels.Segment) kernels.Layout {
	return &layout{segments: append([]kernels.Segment(nil), segments...)}
}

func (d *device) LayoutScratch(segments, t int) int64 { return 0 }

func (d *device) AttentionScratch(t, h, kv, hd int, backward bool) int64 { return 0 }

func (d *device) Attention(x kernels.Attention) {
	const op = "attention"
	h, kv, hd := x.H, x.KV, x.HD
	checkHeads(op, x.T, h, kv, hd)
	out, lse := floats(op, "Out", x.Out, x.T*h*hd), optional(op, "LSE", x.LSE, x.T*h)
	q, k, v := anyFloats(op, "Q", x.Q.Buf), anyFloats(op, "K", x.K.Buf), anyFloats(op, "V", x.V.Buf)
	pk, pv := k, v
	if x.PK.Buf != nil {
		pk, pv = anyFloats(op, "PK", x.PK.Buf), anyFloats(op, "PV", x.PV.Buf)
	}
	scale := float32(1 / math.Sqrt(float64(hd)))
	segments := x.Layout.Segments()
	d.each(len(segments)*h, func(_, task int) {
		s, head := segments[task/h], task%h
		kh := head / (h / kv)
		p := make([]float32, s.PrefixLen+s.KLen)
		for i := range int(s.QLen) {
			qrow := q[x.Q.Off+(int(s.Q)+i)*x.Q.Stride+head*hd:][:hd]
			seen := max(0, i+1+int(s.KLen-s.QLen))
			row := p[:int(s.PrefixLen)+seen]
			top := math.Inf(-1)
			for j := range row {
				var key []float32
				if j < int(s.PrefixLen) {
					key = pk[x.PK.Off+(int(s.Prefix)+j)*x.PK.Stride+kh*hd:][:hd]
				} else {
					key = k[x.K.Off+(int(s.K)+j-int(s.PrefixLen))*x.K.Stride+kh*hd:][:hd]
				}
				row[j] = dot(qrow, key) * scale
				top = max(top, float64(row[j]))
			}
			var sum float64
			for j, z := range row {
				e := math.Exp(float64(z) - top)
				row[j] = float32(e)
				sum += e
			}
			o := out[(int(s.Q)+i)*h*hd+head*hd:][:hd]
			clear(o)
			for j, e := range row {
				var val []float32
				if j < int(s.PrefixLen) {
					val = pv[x.PV.Off+(int(s.Prefix)+j)*x.PV.Stride+kh*hd:][:hd]
				} else {
					val = v[x.V.Off+(int(s.K)+j-int(s.PrefixLen))*x.V.Stride+kh*hd:][:hd]
				}
				axpy(e/float32(sum), val, o)
			}
			if lse != nil {
				lse[(int(s.Q)+i)*h+head] = float32(top + math.Log(sum))
			}
		}
	})
}

func (d *device) AttentionBackward(x kernels.AttentionBackward) {
	const op = "attention backward"
	h, kv, hd := x.H, x.KV, x.HD
	w := checkHeads(op, x.T, h, kv, hd)
	dqkv, qkv := floats(op, "DQKV", x.DQKV, x.T*w), floats(op, "QKV", x.QKV, x.T*w)
	dout, out := floats(op, "DOut", x.DOut, x.T*h*hd), floats(op, "Out", x.Out, x.T*h*hd)
	lse := floats(op, "LSE", x.LSE, x.T*h)
	scale := float32(1 / math.Sqrt(float64(hd)))
	segments := x.Layout.Segments()
	clear(dqkv)
	d.each(kv, func(_, kh int) {
		for head := kh * (h / kv); head < (kh+1)*(h/kv); head++ {
			for _, s := range segments {
				for i := range int(s.QLen) {
					t := int(s.Q) + i
					do := dout[t*h*hd+head*hd:][:hd]
					delta := dot(do, out[t*h*hd+head*hd:][:hd])
					seen := max(0, i+1+int(s.KLen-s.QLen))
					for j := range int(s.PrefixLen) + seen {
						r := int(s.Prefix) + j
						if j >= int(s.PrefixLen) {
							r = int(s.K) + j - int(s.PrefixLen)
						}
						q, k, v := qkv[t*w+head*hd:][:hd], qkv[r*w+(h+kh)*hd:][:hd], qkv[r*w+(h+kv+kh)*hd:][:hd]
						p := exp(dot(q, k)*scale - lse[t*h+head])
						ds := p * (dot(do, v) - delta) * scale
						axpy(p, do, dqkv[r*w+(h+kv+kh)*hd:][:hd])
						axpy(ds, q, dqkv[r*w+(h+kh)*hd:][:hd])
						axpy(ds, k, dqkv[t*w+head*hd:][:hd])
					}
				}
			}
		}
	})
}
