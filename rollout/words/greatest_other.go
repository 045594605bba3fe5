//go:build !amd64

package words

const fast = false

func greatest(*byte, int) (int32, uint32) { panic("no assembly") }
