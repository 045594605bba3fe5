// Command simdgen writes the assembly of package simd with avo. It is a module
// of its own, so that the product does not depend on avo. Run it through
// `go generate` in the package's folder.
package main
