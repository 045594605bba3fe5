package simd

// Level is an instruction set that the package has code for.
type Level uint8

const (
	Portable Level = iota // any GOARCH
	AVX2                  // AVX2, FMA and F16C: 8 lanes
	AVX512                // AVX-512 F, VL, DQ and BW: 16 lanes
)

// String returns "portable", "avx2" or "avx512".
func (l Level) String() string { return [...]string{"portable", "avx2", "avx512"}[l] }

var (
	best   = detect() // what this processor can do
	active = best     // what calls use
)

// Levels returns the levels that this processor can run, from Portable upwards.
func Levels() []Level {
	var all []Level
	for l := Portable; l <= best; l++ {
		all = append(all, l)
	}
	return all
}

// Active returns the level in use.
func Active() Level { return active }

// Use selects a level for all later calls and returns the one that was in use.
// It is for tests and benchmarks: not safe beside running calls. A level that
// the processor lacks panics.
func Use(l Level) (previous Level) {
	if l > best {
		panic("simd: this processor lacks " + l.String())
	}
	previous, active = active, l
	return previous
}
