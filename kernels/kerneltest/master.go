package kerneltest

import (
	"math"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// storeMaster writes exact float32 masters into a weight: the upper half,
// rounded half up, and the signed remainder to the exact bits.
func (e *env) storeMaster(p, rem kernels.Buffer, x []float64) {
	high, low := make([]float32, len(x)), make([]int16, len(x))
	for i, v := range x {
		bits := math.Float32bits(float32(v))
		upper := (bits + 0x8000) >> 16
		high[i] = math.Float32frombits(upper << 16)
		low[i] = int16(bits - upper<<16)
	}
	e.dev.Upload(p, tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(high)))
	e.dev.Upload(rem, tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(low)))
}

// readMaster returns the float32 masters of a weight; without remainders they are the weight.
func (e *env) readMaster(p, rem kernels.Buffer) []float64 {
	e.Helper()
	x := e.read(p)
	if rem == nil {
		return x
	}
	low := make([]int16, len(x))
	if err := e.dev.Download(tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(low)), rem); err != nil {
		e.Fatalf("download remainders: %v", err)
	}
	for i, v := range x {
		x[i] = float64(math.Float32frombits(math.Float32bits(float32(v)) + uint32(int32(low[i]))))
	}
	return x
}
