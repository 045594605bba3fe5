package kernels

// Rounder is a Device that makes the weights of a checkpoint on their way to the
// host, where one after the other would be made of what Download gives. p holds
// the weights, and with rem they are the float32 masters that the two halves
// make. Both methods wait for the operations before them. Lengths must agree.
type Rounder interface {
	// DownloadRounded copies the weights to dst as bits of bfloat16, rounded to
	// nearest, ties to even. finite says that no value of dst is infinite or NaN.
	// Where one is, the caller has to look what it was before: a weight that is
	// too large rounds to infinity.
	DownloadRounded(dst []uint16, p, rem Buffer) (finite bool, err error)
	// DownloadMasters copies the weights to dst, exact.
	DownloadMasters(dst []float32, p, rem Buffer) error
}

// Finite16 reports whether no bfloat16 value is infinite or NaN.
func Finite16(x []uint16) bool {
	const exponent = 0x7f80
	for _, h := range x {
		if h&exponent == exponent {
			return false
		}
	}
	return true
}
