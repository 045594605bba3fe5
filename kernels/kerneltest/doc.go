// Package kerneltest holds every kernels.Device to float64 references.
//
// Run takes a device through one table of cases for each operation: fresh
// random inputs (the seed is printed; -kerneltest.seed repeats a run), outputs
// and scratch filled with NaN beforehand, arenas of exactly the planned
// capacity. Inputs are rounded to the device's type first, so what is compared
// is the operation and not the rounding of its inputs.
//
// The references (ref_*.go) are plain loops, one per formula. Their gradients
// are themselves held to central finite differences (reference_test.go), so
// that a wrong formula cannot hide on both sides.
//
// # Tolerances
//
// With u32 = 2^-24 and u the unit roundoff of the device's compute type (2^-24
// for F32, 2^-8 for BF16), a sum of K products in float32, in any order, is off
// by at most about (K+2)*u32*sum|a_k*b_k|, and storing y adds u*|y|. References
// therefore return, beside each value, the magnitude its error scales with; a
// case states the number of roundings on the way as its factor. The bounds are
// worst cases: they hold for every seed.
//
// Read run.go first, then any case_*.go with its ref_*.go.
package kerneltest
