package kerneltest

import "math"

// refRMSNorm returns x*rstd*w for rows of width d, and rstd.
func refRMSNorm(x, w []float64, d int, eps float64) (out, rstd []float64) {
	t := len(x) / d
	out, rstd = make([]float64, len(x)), make([]float64, t)
	for i := range t {
		s := 0.0
		for _, v := range x[i*d : (i+1)*d] {
			s += v * v
		}
		rstd[i] = 1 / math.Sqrt(s/float64(d)+eps)
		for j := range d {
			out[i*d+j] = x[i*d+j] * rstd[i] * w[j]
		}
	}
	return out, rstd
}

// refRMSNormBackward returns the gradients of x and w.
func refRMSNormBackward(dy, x, w, rstd []float64, d int) (dx, dw []value) {
	t := len(x) / d
	dx, dw = make([]value, len(x)), make([]value, d)
	for i := range t {
		r, s, mag := rstd[i], 0.0, 0.0
		for j := range d {
			p := dy[i*d+j] * w[j] * x[i*d+j]
			s, mag = s+p, mag+math.Abs(p)
		}
		c := r * r * r / float64(d)
		for j := range d {
			g, v := dy[i*d+j], x[i*d+j]
			dx[i*d+j] = value{r*g*w[j] - v*c*s, math.Abs(r*g*w[j]) + math.Abs(v)*c*mag}
			dw[j].v += g * v * r
			dw[j].mag += math.Abs(g * v * r)
		}
	}
	return dx, dw
}

// refRotate turns the pairs (i, i+hd/2) of one head by pos*theta^(-2i/hd)*sign.
func refRotate(x []float64, pos int32, theta, sign float64) []float64 {
	half := len(x) / 2
	out := make([]float64, len(x))
	for i := range half {
		s, c := math.Sincos(float64(pos) * math.Pow(theta, -float64(2*i)/float64(2*half)))
		s *= sign
		out[i], out[half+i] = x[i]*c-x[half+i]*s, x[half+i]*c+x[i]*s
	}
	return out
}

// ropeShape is what Rope is told besides its matrices.
type ropeShape struct {
	t, h, kv, hd int
	theta, eps   float64
	pos          []int32
	qw, kw       []float64 // nil: no QK-norm
}

func (s ropeShape) width() int { return (s.h + 2*s.kv) * s.hd }

func (s ropeShape) weight(head int) []float64 {
	if head < s.h {
		return s.qw
	}
	return s.kw
}

// refRope returns the rotated rows and, with QK-norm, rstd [T,H+KV].
func refRope(in []float64, s ropeShape) (out, rstd []float64) {
	out = append([]float64(nil), in...)
	rstd = make([]float64, s.t*(s.h+s.kv))
	for i := range s.t {
		for j := range s.h + s.kv {
			x := in[i*s.width()+j*s.hd:][:s.hd]
			if s.qw != nil {
				y, r := refRMSNorm(x, s.weight(j), s.hd, s.eps)
				x, rstd[i*(s.h+s.kv)+j] = y, r[0]
			}
			copy(out[i*s.width()+j*s.hd:], refRotate(x, s.pos[i], s.theta, 1))
		}
	}
	return out, rstd
}

// refRopeBackward returns the gradients of the input rows and of qw|kw.
func refRopeBackward(d, in []float64, s ropeShape) (dx, dw []value) {
	dx, dw = make([]value, len(d)), make([]value, 2*s.hd)
	_, rstd := refRope(in, s)
	for i, v := range d {
		dx[i] = value{v, math.Abs(v)}
	}
	for i := range s.t {
		for j := range s.h + s.kv {
			at := i*s.width() + j*s.hd
			g := refRotate(d[at:][:s.hd], s.pos[i], s.theta, -1)
			half := s.hd / 2
			for k := range s.hd {
				dx[at+k] = value{g[k], math.Abs(d[at+k%half]) + math.Abs(d[at+half+k%half])}
			}
			if s.qw == nil {
				continue
			}
			x, w := refRMSNormBackward(g, in[at:][:s.hd], s.weight(j), rstd[i*(s.h+s.kv)+j:][:1], s.hd)
			copy(dx[at:], x)
			sum := dw[:s.hd]
			if j >= s.h {
				sum = dw[s.hd:]
			}
			for k := range w {
				// The rotation mixes both elements of a pair into the error.
				pair := math.Abs(d[at+k%half]) + math.Abs(d[at+half+k%half])
				sum[k].v += w[k].v
				sum[k].mag += pair * math.Abs(in[at+k]*rstd[i*(s.h+s.kv)+j])
			}
			// and through the mean over the head into all of dx
			most := 0.0
			for k := range s.hd {
				most = max(most, math.Abs(d[at+k]))
			}
			for k := range s.hd {
				r := rstd[i*(s.h+s.kv)+j]
				dx[at+k].mag += 2 * most * r * maxAbs(s.weight(j)) * (1 + r*math.Abs(in[at+k]))
			}
		}
	}
	return dx, dw
}

func maxAbs(x []float64) float64 {
	m := 0.0
	for _, v := range x {
		m = max(m, math.Abs(v))
	}
	return m
}
