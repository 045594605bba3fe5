package kernels

// Rounder is a Device that rounds weights on their way to the host, for a
// checkpoint that holds them as bfloat16.
type Rounder interface {
	// DownloadRounded waits for the operations before it and copies p to dst as
	// bits of bfloat16: the float32 values of p, or with rem those of the masters
	// that the two halves make, rounded to nearest, ties to even. Lengths must agree.
	//
	// finite says that no value of dst is infinite. Where one is, the caller has to
	// look whether it was before: a weight that is too large rounds to infinity.
	DownloadRounded(dst []uint16, p, rem Buffer) (finite bool, err error)
}

// Finite16 reports whether no bfloat16 value is infinite. NaN passes.
func Finite16(x []uint16) bool {
	for _, h := range x {
		if h<<1 == 0x7f80<<1 { // all exponent bits and no others, but for the sign
			return false
		}
	}
	return true
}
