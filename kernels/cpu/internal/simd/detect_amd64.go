package simd

import "golang.org/x/sys/cpu"

// detect returns the highest level that processor and operating system support.
func detect() Level {
	x := cpu.X86
	switch {
	case !x.HasAVX2 || !x.HasFMA || !x.HasF16C:
		return Portable
	case x.HasAVX512F && x.HasAVX512VL && x.HasAVX512DQ && x.HasAVX512BW:
		return AVX512
	}
	return AVX2
}
