//go:build !amd64

package simd

// noAssembly is what a stub panics with; the levels that would call it are not offered.
const noAssembly = "simd: no assembly for this architecture"
