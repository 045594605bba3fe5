package cuda

import (
	"fmt"
	"unsafe"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// words views bytes as numbers.
func words[T int8 | int16 | int32 | float32 | float64](b []byte) []T {
	var x T
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/int(unsafe.Sizeof(x)))
}

// raw views numbers as bytes.
func raw[T int8 | int16 | uint16 | int32 | float32 | float64](x []T) []byte {
	if len(x) == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(x))), len(x)*int(unsafe.Sizeof(x[0])))
}

// host returns the bytes of a contiguous host tensor and the buffer type that holds its elements.
func host(op string, x *tensor.Dense) ([]byte, kernels.DType) {
	must(x != nil, op, "host tensor is nil")
	must(!x.RequiresIterator() && !x.DataOrder().IsColMajor(), op, "host tensor of shape %v is not contiguous row-major", x.Shape())
	switch data := x.Data().(type) {
	case float32: // a scalar tensor hands out its value; its memory is behind Get and Set
		return raw(x.Float32s()), kernels.F32
	case int32:
		return raw(x.Int32s()), kernels.I32
	case []float32:
		return raw(data), kernels.F32
	case []int32:
		return raw(data), kernels.I32
	case []int16:
		return raw(data), kernels.I16
	case []int8:
		return raw(data), kernels.I8
	}
	panic(fmt.Sprintf("%s: host tensor of %v, expected float32, int32, int16 or int8", op, x.Dtype()))
}

// matched returns a buffer that must agree with a host tensor in length and type; one
// of bf16 goes with float32, and with int16 as its bits.
func matched(op string, b kernels.Buffer, x []byte, t kernels.DType) *buffer {
	types := []kernels.DType{t}
	if t == kernels.F32 || t == kernels.I16 {
		types = append(types, kernels.BF16)
	}
	c := span(op, "buffer", b, types...)
	must(c.n == len(x)/t.Size(), op, "buffer holds %d elements, host tensor %d", c.n, len(x)/t.Size())
	return c
}

// Upload implements kernels.Device. The host tensor may be changed when it returns.
func (d *Device) Upload(dst kernels.Buffer, src *tensor.Dense) {
	const op = "upload"
	x, t := host(op, src)
	b := matched(op, dst, x, t)
	d.send(op, b.at, x, t == kernels.F32 && b.t == kernels.BF16)
}

// send copies host bytes to the card; with round they are float32 that become bf16 there.
func (d *Device) send(op string, dst address, x []byte, round bool) {
	for len(x) > 0 {
		room := d.room(len(x))
		n := copy(room, x)
		room = room[:n:n]
		x = x[n:]
		to := dst
		if !round {
			d.enqueue(of(op, "%d bytes", n), func(c driver) error { return c.upload(to, room) })
			dst += address(n)
			continue
		}
		count := n / 4
		d.enqueue(of(op, "%d float32 to bf16", count), func(c driver) error {
			if err := c.upload(d.stage, room); err != nil {
				return err
			}
			return elementwise(c, "cast_f32_bf16", count, to, d.stage)
		})
		dst += address(2 * count)
	}
}

// room returns pinned memory for up to n bytes that the card no longer reads:
// two slots are filled in turn, and a slot is filled anew only when the card has
// passed the mark that was set when it was full.
func (d *Device) room(n int) []byte {
	if d.upAt+min(n, alignment) > stageBytes {
		full := d.upSlot
		// Both also behind an error: copies that were begun before it still read the slots.
		d.q.put(command{label: of("upload", "mark %d", full), always: true, run: func(c driver) error { return c.mark(full) }})
		d.upSlot, d.upAt = 1-full, 0
		next := d.upSlot
		_ = d.q.call(command{label: of("upload", "wait %d", next), always: true, run: func(c driver) error { return c.wait(next) }})
	}
	n = min(n, stageBytes-d.upAt)
	out := d.up[d.upSlot][d.upAt:][:n]
	d.upAt += int(kernels.Round(int64(n), alignment))
	return out
}

// Download implements kernels.Device.
func (d *Device) Download(dst *tensor.Dense, src kernels.Buffer) error {
	const op = "download"
	x, t := host(op, dst)
	b := matched(op, src, x, t)
	return d.receive(op, x, b.at, t == kernels.F32 && b.t == kernels.BF16)
}

// receive waits for the operations before it and copies from the card to host
// bytes; with widen, bf16 there become float32 here.
func (d *Device) receive(op string, x []byte, src address, widen bool) error {
	if d.pinned(x) {
		return d.receivePinned(op, x, src, widen)
	}
	for len(x) > 0 {
		n, from := min(len(x), stageBytes), src
		err := d.q.call(command{label: of(op, "%d bytes", n), run: func(c driver) error {
			at := from
			if widen {
				at = d.stage
				if err := elementwise(c, "cast_bf16_f32", n/4, d.stage, from); err != nil {
					return err
				}
			}
			if err := c.download(d.down[:n], at); err != nil {
				return err
			}
			return c.sync()
		}})
		if err != nil {
			return err
		}
		copy(x[:n], d.down)
		x = x[n:]
		if widen {
			n /= 2
		}
		src += address(n)
	}
	return nil
}

// receivePinned is receive where the card may write to x itself.
func (d *Device) receivePinned(op string, x []byte, src address, widen bool) error {
	if !widen {
		d.enqueue(of(op, "%d bytes", len(x)), func(c driver) error { return c.download(x, src) })
		return d.wait(op)
	}
	for from := 0; from < len(x); from += stageBytes {
		room, at := x[from:min(len(x), from+stageBytes)], src+address(from/2)
		d.enqueue(of(op, "%d bytes", len(room)), func(c driver) error {
			if err := elementwise(c, "cast_bf16_f32", len(room)/4, d.stage, at); err != nil {
				return err
			}
			return c.download(room, d.stage)
		})
	}
	return d.wait(op)
}

// fetched is a download that Sync hands over: pinned memory that the card writes, and where it goes.
type fetched struct{ dst, pinned []byte }

// Fetch implements kernels.Fetcher. What does not fit into the room for it is waited for.
func (d *Device) Fetch(dst *tensor.Dense, src kernels.Buffer) error {
	const op = "download"
	x, t := host(op, dst)
	b := matched(op, src, x, t)
	if len(x) == 0 {
		return nil
	}
	n := int(kernels.Round(int64(len(x)), alignment))
	if b.t != t || n > fetchBytes-d.lateAt {
		return d.receive(op, x, b.at, b.t == kernels.BF16)
	}
	room, from := d.late[d.lateAt:][:len(x):len(x)], b.at
	d.lateAt += n
	d.fetches = append(d.fetches, fetched{x, room})
	d.enqueue(of(op, "%d bytes", len(x)), func(c driver) error { return c.download(room, from) })
	return nil
}

// handOver copies what was fetched to where it goes, once the card has written it;
// after an error it is forgotten.
func (d *Device) handOver(err error) {
	for _, f := range d.fetches {
		if err == nil {
			copy(f.dst, f.pinned)
		}
	}
	clear(d.fetches)
	d.fetches, d.lateAt = d.fetches[:0], 0
}

// elementwise launches a kernel of elementwise.cu with (dst, src, n).
func elementwise(c driver, kernel string, n int, dst, src address) error {
	return c.launch(kernel, size2{clamp(ceil(n, 2048), 1, 2112), 1}, size2{256, 1}, 0, dst, src, int64(n))
}

// Zero implements kernels.Device.
func (d *Device) Zero(dst kernels.Buffer) {
	b := span("zero", "dst", dst, kernels.F32, kernels.BF16, kernels.I32, kernels.I16, kernels.I8)
	d.fill("zero", b.at, b.bytes())
}

// fill zeroes n bytes.
func (d *Device) fill(op string, at address, n int64) {
	if n > 0 {
		d.enqueue(of(op, "%d bytes", int(n)), func(c driver) error { return c.fill(at, 0, n) })
	}
}

// Copy implements kernels.Device.
func (d *Device) Copy(dst, src kernels.Buffer) {
	const op = "copy"
	a, b := span(op, "dst", dst, kernels.F32, kernels.BF16, kernels.I32, kernels.I16, kernels.I8), span(op, "src", src, kernels.F32, kernels.BF16, kernels.I32, kernels.I16, kernels.I8)
	must(a.n == b.n, op, "dst is %d %v, src %d %v", a.n, a.t, b.n, b.t)
	if a.n == 0 {
		return
	}
	n, to, from := a.n, a.at, b.at
	l := of(op, "%d elements", n)
	switch {
	case a.t == b.t:
		size := a.bytes()
		d.enqueue(l, func(c driver) error { return c.move(to, from, size) })
	case a.t == kernels.BF16 && b.t == kernels.F32:
		d.enqueue(l, func(c driver) error { return elementwise(c, "cast_f32_bf16", n, to, from) })
	case a.t == kernels.F32 && b.t == kernels.BF16:
		d.enqueue(l, func(c driver) error { return elementwise(c, "cast_bf16_f32", n, to, from) })
	default:
		panic(fmt.Sprintf("%s: dst is %d %v, src %d %v", op, a.n, a.t, b.n, b.t))
	}
}

// Lerp implements kernels.Device.
func (d *Device) Lerp(dst, src kernels.Buffer, alpha float32) {
	const op = "lerp"
	a := span(op, "dst", dst, kernels.F32, kernels.BF16)
	from := place(op, "src", src, a.n, a.t)
	if a.n == 0 {
		return
	}
	kernel, n, to := "lerp_f32", a.n, a.at
	if a.t == kernels.BF16 {
		kernel = "lerp_bf16"
	}
	d.enqueue(of(op, "%d elements", n), func(c driver) error {
		return c.launch(kernel, size2{min(ceil(n, 2048), 2112), 1}, size2{256, 1}, 0, to, from, alpha, int64(n))
	})
}
