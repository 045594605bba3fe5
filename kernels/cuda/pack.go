package cuda

import (
	"encoding/binary"
	"fmt"
	"math"
)

// pack lays kernel parameters out as a C struct does, which is what a launch
// takes: each at a multiple of its size. The result aliases buf where it fits.
func pack(buf []byte, args []any) []byte {
	buf = buf[:0]
	for i, a := range args {
		size := 4
		switch a.(type) {
		case address, int64:
			size = 8
		}
		for len(buf)%size != 0 {
			buf = append(buf, 0)
		}
		switch x := a.(type) {
		case address:
			buf = binary.NativeEndian.AppendUint64(buf, x)
		case int64:
			buf = binary.NativeEndian.AppendUint64(buf, uint64(x))
		case int32:
			buf = binary.NativeEndian.AppendUint32(buf, uint32(x))
		case float32:
			buf = binary.NativeEndian.AppendUint32(buf, math.Float32bits(x))
		default:
			panic(fmt.Sprintf("launch: parameter %d is a %T, expected address, int64, int32 or float32", i, a))
		}
	}
	return buf
}
