package cpu

import (
	"fmt"
	"math"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

// ropeKey is what a table of angles depends on.
type ropeKey struct {
	theta float64
	half  int
}

// ropeTable holds cosine and sine of position*theta^(-i/half) for positions
// [0,positions): computing them for every layer would cost more than the rest of Rope.
type ropeTable struct {
	positions int
	cos, sin  []float32 // [positions, half]
}

// angles returns a table that reaches all positions.
func (d *device) angles(theta float64, half int, pos []int32) *ropeTable {
	top := 0
	for i, p := range pos {
		if p < 0 {
			panic(fmt.Sprintf("rope: Pos[%d] is %d, expected 0 or more", i, p))
		}
		top = max(top, int(p)+1)
	}
	key := ropeKey{theta, half}
	table := d.rope[key]
	if table == nil {
		table = &ropeTable{}
		d.rope[key] = table
	}
	if top <= table.positions {
		return table
	}
	top = max(top, 2*table.positions, 256)
	cos, sin := make([]float32, top*half), make([]float32, top*half)
	frequency := make([]float64, half)
	for i := range frequency {
		frequency[i] = math.Pow(theta, -float64(i)/float64(half))
	}
	d.blocks(top, 64, func(from, to int) {
		for p := from; p < to; p++ {
			for i, f := range frequency {
				s, c := math.Sincos(float64(p) * f)
				cos[p*half+i], sin[p*half+i] = float32(c), float32(s)
			}
		}
	})
	*table = ropeTable{positions: top, cos: cos, sin: sin}
	return table
}

func (d *device) Rope(x kernels.Rope) {
	const op = "rope"
	t, h, kv, hd := x.T, x.H, x.KV, x.HD
	width := checkHeads(op, t, h, kv, hd)
	out, in, pos := floats(op, "Out", x.Out, t*width), floats(op, "In", x.In, t*width), ints(op, "Pos", x.Pos, t)
	qw, kw := optional(op, "QW", x.QW, hd), optional(op, "KW", x.KW, hd)
	must((x.QW == nil) == (x.KW == nil), op, "QW and KW go together")
	must(x.QW == nil || t == 0 || &out[0] != &in[0], op, "Out aliases In, which QK-norm does not allow")
	var rstd []float32
	if x.QW != nil {
		rstd = optional(op, "Rstd", x.Rstd, t*(h+kv))
	}
	table, half := d.angles(x.Theta, hd/2, pos), hd/2
	d.blocks(t, rowBlock(width), func(from, to int) {
		for i := from; i < to; i++ {
			cos, sin := table.cos[int(pos[i])*half:][:half], table.sin[int(pos[i])*half:][:half]
			for j := range h + kv {
				src, dst := in[i*width+j*hd:][:hd], out[i*width+j*hd:][:hd]
				if x.QW != nil {
					w := qw
					if j >= h {
						w = kw
					}
					r := inverseRMS(src, x.Eps)
					if x.Rstd != nil {
						rstd[i*(h+kv)+j] = r
					}
					simd.ScaleMul(dst, src, w, r)
					src = dst
				}
				simd.Rope(dst, src, cos, sin)
			}
			copy(out[i*width+(h+kv)*hd:][:kv*hd], in[i*width+(h+kv)*hd:][:kv*hd])
		}
	})
}

func (d *device) RopeBackward(x kernels.RopeBackward) {
	const op = "rope backward"
	t, h, kv, hd := x.T, x.H, x.KV, x.HD
	width := checkHeads(op, t, h, kv, hd)
	grad, pos := floats(op, "D", x.D, t*width), ints(op, "Pos", x.Pos, t)
	table, half := d.angles(x.Theta, hd/2, pos), hd/2
	turn := func(i int) {
		cos, sin := table.cos[int(pos[i])*half:][:half], table.sin[int(pos[i])*half:][:half]
		for j := range h + kv {
			g := grad[i*width+j*hd:][:hd]
			simd.RopeInverse(g, g, cos, sin)
		}
	}
	if x.QW == nil {
		d.blocks(t, rowBlock(width), func(from, to int) {
			for i := from; i < to; i++ {
				turn(i)
			}
		})
		return
	}
	in, rstd := floats(op, "In", x.In, t*width), floats(op, "Rstd", x.Rstd, t*(h+kv))
	qw, kw := floats(op, "QW", x.QW, hd), floats(op, "KW", x.KW, hd)
	dqw, dkw := floats(op, "DQW", x.DQW, hd), floats(op, "DKW", x.DKW, hd)
	both := make([]float32, 2*hd) // dqw and dkw in one reduction
	d.reduceRows(both, t, false, func(wk *worker, sum []float32, from, to int) {
		temp := wk.floats(hd)
		for i := from; i < to; i++ {
			turn(i)
			for j := range h + kv {
				w, dw := qw, sum[:hd]
				if j >= h {
					w, dw = kw, sum[hd:]
				}
				g := grad[i*width+j*hd:][:hd]
				simd.NormBackward(g, dw, g, in[i*width+j*hd:], w, temp, rstd[i*(h+kv)+j], false)
			}
		}
	})
	if !x.Accumulate {
		clear(dqw)
		clear(dkw)
	}
	simd.Add(dqw, dqw, both[:hd])
	simd.Add(dkw, dkw, both[hd:])
}

// checkHeads returns W, the width of packed q|k|v rows.
func checkHeads(op string, t, h, kv, hd int) int {
	must(t >= 0 && h > 0 && kv > 0 && h%kv == 0 && hd > 0 && hd%2 == 0, op,
		"T %d H %d KV %d hd %d, expected H a multiple of KV and hd even", t, h, kv, hd)
	return (h + 2*kv) * hd
}
