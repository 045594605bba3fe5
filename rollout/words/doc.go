// Package words looks at many 32-bit values at once, as they lie in a stream. One
// pass at the pace of memory tells what checks of tokens and of log-probs ask:
// the ranges that they allow are bounds of the bits, read with a sign or without.
//
// It is no arithmetic on floats: see Finite for why that is enough.
package words
