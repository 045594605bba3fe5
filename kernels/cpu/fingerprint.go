package cpu

import (
	"runtime"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

var _ kernels.Fingerprinter = (*device)(nil)

// Fingerprint implements kernels.Fingerprinter. Widths of vectors divide sums
// differently, and what is Go the compiler fuses on some architectures; the
// processor's model and the number of workers change nothing.
func (d *device) Fingerprint() kernels.Fingerprint {
	return kernels.Fingerprint{Device: "cpu", Instructions: runtime.GOARCH + " " + simd.Active().String()}
}
