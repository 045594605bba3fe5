package simd

import (
	"math"
	"testing"
)

// ulps is the distance of got from want in units of the last place of want.
func ulps(got float32, want float64) float64 {
	w := float32(want)
	if math.IsInf(float64(w), 0) || w == 0 {
		if got == w {
			return 0
		}
	}
	ulp := float64(math.Nextafter32(float32(math.Abs(want)), float32(math.Inf(1)))) - math.Abs(float64(float32(math.Abs(want))))
	return math.Abs(float64(got)-want) / ulp
}

// TestExpUlps sweeps the whole range, denormal results included.
func TestExpUlps(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		x := make([]float32, 200000)
		for i := range x {
			x[i] = float32(-104.5 + 193.2*r.Float64())
		}
		got := make([]float32, len(x))
		ExpShift(got, x, 0)
		worst := 0.0
		for i, v := range got {
			want := math.Exp(float64(x[i]))
			if math.IsInf(float64(float32(want)), 0) {
				continue
			}
			if u := ulps(v, want); u > worst {
				worst = u
				if worst > 2 {
					t.Fatalf("exp(%g) = %g, want %g: %.2f ulp", x[i], v, want, u)
				}
			}
		}
		t.Logf("worst error %.3f ulp", worst)
	})
}

func TestExpSpecials(t *testing.T) {
	inf := float32(math.Inf(1))
	in := []float32{0, -inf, inf, poison, -104.01, -1e30, 89, 1e30, -103.9, float32(math.Copysign(0, -1)), 88.72}
	want := []float32{1, 0, inf, poison, 0, 0, inf, inf, 0x1p-149, 1, float32(math.Exp(float64(float32(88.72))))}
	eachLevel(t, func(t *testing.T) {
		for pad := range 33 { // every lane, tails included
			x := append(make([]float32, pad), in...)
			out := newGuarded(len(x), 2)
			ExpShift(out.x, x, 0)
			out.check(t, "exp")
			for i, w := range want {
				g := out.x[pad+i]
				if (w != w) != (g != g) || w == w && g != w && !(ulps(g, float64(w)) <= 2) {
					t.Fatalf("exp(%g) = %g, want %g (lane %d)", in[i], g, w, pad+i)
				}
			}
		}
		if s := ExpShift(make([]float32, 3), []float32{1, poison, 2}, 0); s == s {
			t.Error("the sum hides a NaN")
		}
	})
}

// TestSoftmaxPieces holds sums, entropy and gradient of tempered logits to float64.
func TestSoftmaxPieces(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, n := range lengths() {
			if n == 0 {
				continue
			}
			z := normals(r, n)
			for i := range z {
				z[i] *= 5
			}
			if n > 2 {
				z[n/2] = float32(math.Inf(-1))
			}
			const scale = float32(0.8)
			shift := scale * Max(z)
			var sum, prod float64
			for _, v := range z {
				if y := float64(scale)*float64(v) - float64(shift); y > -1000 {
					sum, prod = sum+math.Exp(y), prod+math.Exp(y)*y
				}
			}
			// An argument y carries |y|*u, exp 2 ulp <= 4u, and the sum of a block at
			// most min(n, sumBlock)*u over all terms; |y| <= 50 here, where the terms
			// matter far less.
			tol := (float64(min(n, sumBlock)) + 60) * unit
			out := newGuarded(n, 3)
			s1 := float64(ExpScaleShift(out.x, z, scale, shift))
			out.check(t, "exp")
			s2, p2 := LogitStats(z, scale, shift)
			s3 := float64(ExpSum(z, shift, scale))
			for _, s := range []float64{s1, s2, s3} {
				if !(math.Abs(s-sum) <= tol*sum) {
					t.Fatalf("sum of exp over %d: %g, want %g", n, s, sum)
				}
			}
			if !(math.Abs(p2-prod) <= tol*math.Abs(prod)) {
				t.Fatalf("sum of exp*y over %d: %g, want %g", n, p2, prod)
			}

			lse := float32(float64(shift) + math.Log(sum))
			const a, b = float32(0.3), float32(-0.2)
			copy(out.x, z)
			DLogits(out.x, out.x, scale, lse, a, b)
			out.check(t, "dlogits")
			for i, g := range out.x {
				y := float64(scale)*float64(z[i]) - float64(lse)
				want, mag := 0.0, 0.0
				if y > -1000 {
					want = math.Exp(y) * (float64(a) + float64(b)*y)
					mag = math.Exp(y) * (float64(a) + math.Abs(float64(b)*y))
				}
				if !(math.Abs(float64(g)-want) <= (8+math.Abs(max(y, -1000)))*unit*mag+0x1p-149) {
					t.Fatalf("dlogits[%d] of %d is %g, want %g", i, n, g, want)
				}
			}
		}
	})
}

func TestSiLUMul(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, n := range lengths() {
			gate, up, dout := normals(r, n), normals(r, n), normals(r, n)
			for i := range gate {
				gate[i] *= 10
			}
			if n > 3 {
				gate[0], gate[1], gate[2], gate[3] = 0, -200, 200, -1e30
			}
			out, dgate, dup := newGuarded(n, 1), newGuarded(n, 2), newGuarded(n, 3)
			SiLUMul(out.x, gate, up)
			SiLUMulBackward(dgate.x, dup.x, dout, gate, up)
			out.check(t, "silu")
			dgate.check(t, "dgate")
			dup.check(t, "dup")
			for i := range n {
				g, u, d := float64(gate[i]), float64(up[i]), float64(dout[i])
				sig := 1 / (1 + math.Exp(-g))
				h := g * sig
				if gate[i] < -1000 {
					h = 0 // -1e30 * exp(-1e30)
				}
				// exp 4u, the quotient and products: 10u is generous but of the order.
				// exp(-g) overflows below g = -88.7, where the true values are under 1e-36.
				tol := 10 * unit
				if !(math.Abs(float64(out.x[i])-h*u) <= tol*math.Abs(h*u)+1e-36) {
					t.Fatalf("silu(%g)*%g = %g, want %g", g, u, out.x[i], h*u)
				}
				if !(math.Abs(float64(dup.x[i])-h*d) <= tol*math.Abs(h*d)+1e-36) {
					t.Fatalf("dup(%g) = %g, want %g", g, dup.x[i], h*d)
				}
				slope := sig + h*(1-sig)
				// 1-sig is exact to u absolutely: its error is scaled by |h|.
				if bound := math.Abs(d*u) * (tol*(sig+math.Abs(h*(1-sig))) + 5*unit*math.Abs(h)*sig); !(math.Abs(float64(dgate.x[i])-d*u*slope) <= bound+1e-36) {
					t.Fatalf("dgate(%g) = %g, want %g within %g", g, dgate.x[i], d*u*slope, bound)
				}
			}
			// In place, the gradients take the place of gate and up.
			g2, u2 := clone(gate), clone(up)
			SiLUMulBackward(g2, u2, dout, g2, u2)
			wantSameBits(t, "in place dgate", g2, dgate.x)
			wantSameBits(t, "in place dup", u2, dup.x)
		}
	})
}
