package simd

import (
	"math"

	"trainerd/kernels"
)

// momentFloor is below what a block's greatest first moment is stored as zero:
// its scale has no finite inverse soon after.
const momentFloor = 0x1p-90

// codes is 127², in which the squares of all codes are whole numbers.
const codes = 127 * 127

// momentValue is what a code stands for in units of its block's scale.
func momentValue(code int8) float32 {
	c := int32(code)
	root := float32(c*c) * (1.0 / codes)
	return float32(math.Copysign(float64(root*root), float64(c)))
}

// adamWCompactGo is the definition of a step on compact moments.
func adamWCompactGo(p, g []float32, m []int8, scale []float32, v []uint16, c *AdamWCoef, key kernels.Key, first int64) {
	var fresh [kernels.MomentBlock]float32
	var random [kernels.MomentBlock]uint32
	for b := range scale {
		from := b * kernels.MomentBlock
		n := min(kernels.MomentBlock, len(p)-from)
		p, g, m, v := p[from:from+n], g[from:from+n], m[from:from+n], v[from:from+n]
		unit, peak := scale[b], float32(0)
		for i := range p {
			random[i] = key.Bits(first + int64(from+i))
			grad := c.Grad * g[i]
			first := c.Beta1*(momentValue(m[i])*unit) + c.Alpha1*grad
			second := c.Beta2*math.Float32frombits(uint32(v[i])<<16) + c.Alpha2*grad*grad
			p[i] = c.Decay*p[i] - c.StepSize*first/(float32(math.Sqrt(float64(second)))*c.InvBias2+c.Eps)
			fresh[i] = first
			peak = max(peak, first, -first)
			v[i] = roundBF16(second, random[i])
		}
		if peak < momentFloor {
			scale[b] = 0
			clear(m)
			continue
		}
		scale[b] = peak
		inverse := codes * codes / peak
		for i := range m {
			m[i] = momentCode(fresh[i], inverse, random[i])
		}
	}
}

// momentCode rounds a first moment to a code; inverse is codes² over the block's scale.
func momentCode(x, inverse float32, random uint32) int8 {
	t := x * inverse
	if t < 0 {
		t = -t
	}
	root := float32(math.Sqrt(float64(float32(math.Sqrt(float64(t))))))
	q := int32(root) // q⁴ <= t < (q+1)⁴, but for the roots' rounding
	if q >= 127 {
		q = 127
	} else {
		square := q * q
		below, gap := float32(square)*float32(square), float32((2*square+2*q+1)*(2*q+1)) // (q+1)⁴ - q⁴
		if float32(random>>16)+0.5 < (t-below)/gap*65536 {
			q++
		}
	}
	if x < 0 {
		return int8(-q)
	}
	return int8(q)
}

// roundBF16 rounds to one of the two neighbours by the lower 16 random bits.
func roundBF16(x float32, random uint32) uint16 {
	return uint16((math.Float32bits(x) + random&0xffff) >> 16)
}

func addGradGo(dst []uint16, src []float32, key kernels.Key, first int64) {
	src = src[:len(dst)]
	for i, x := range src {
		sum := math.Float32frombits(uint32(dst[i])<<16) + x
		if sum-sum != 0 { // NaN must not round to infinity
			dst[i] = uint16(math.Float32bits(sum)>>16) | quiet(sum)
			continue
		}
		dst[i] = roundBF16(sum, key.Bits(first+int64(i))>>16)
	}
}

// quiet is the bit that keeps the upper half of a NaN a NaN.
func quiet(x float32) uint16 {
	if x != x {
		return 0x40
	}
	return 0
}
