package cuda

import "trainerd/kernels"

var _ kernels.Rounder = (*Device)(nil)

const (
	// streamChunk is how many values of a download are in work at once: as
	// float32 they fill half of the stage and one of the two slots that the
	// pinned memory is cut into.
	streamChunk = stageBytes / 8
	// slotEvent and the one after it mark that a slot holds its chunk.
	slotEvent = 2
)

// stream copies n values of itemSize bytes to dst, chunk by chunk. produce enqueues
// what leaves count values from index from on somewhere on the card, and returns
// where. While a chunk is copied out of pinned memory the card works on the next;
// to dst that is pinned the card copies itself.
func (d *Device) stream(op string, dst []byte, n, itemSize int, produce func(c driver, from, count int) (address, error)) error {
	if d.pinned(dst) {
		for from := 0; from < n; from += streamChunk {
			room := dst[itemSize*from : itemSize*min(n, from+streamChunk)]
			d.enqueue(of(op, "%d bytes", len(room)), func(c driver) error {
				at, err := produce(c, from, len(room)/itemSize)
				if err == nil {
					err = c.download(room, at)
				}
				return err
			})
		}
		return d.wait(op)
	}
	slot := func(i int) []byte {
		return d.down[i%2*len(d.down)/2:][:itemSize*min(streamChunk, n-i*streamChunk)]
	}
	send := func(i int) {
		room, from := slot(i), i*streamChunk
		d.enqueue(of(op, "%d bytes", len(room)), func(c driver) error {
			at, err := produce(c, from, len(room)/itemSize)
			if err == nil {
				err = c.download(room, at)
			}
			if err == nil {
				err = c.mark(slotEvent + i%2)
			}
			return err
		})
	}
	chunks := ceil(n, streamChunk)
	if chunks > 0 {
		send(0)
	}
	for i := range chunks {
		if i+1 < chunks {
			send(i + 1)
		}
		if err := d.q.call(command{label: of(op, "wait for chunk %d", i), run: func(c driver) error { return c.wait(slotEvent + i%2) }}); err != nil {
			return err
		}
		dst = dst[copy(dst, slot(i)):]
	}
	return nil
}

// weights checks a weight of n elements and its remainder, and returns where they lie.
func weights(op string, n int, p, rem kernels.Buffer) (b *buffer, low address) {
	b = span(op, "p", p, kernels.F32, kernels.BF16)
	must(b.n == n, op, "p holds %d elements, the host %d", b.n, n)
	must(rem == nil || b.t == kernels.BF16, op, "a remainder beside %v", b.t)
	return b, placeOr0(op, "rem", rem, n, kernels.I16)
}

// join enqueues what makes float32 of count weights from index from on, in the
// stage where they are not that already, and returns where they are.
func (d *Device) join(c driver, b *buffer, low address, from, count int) (address, error) {
	at := b.at + address(from*b.t.Size())
	switch {
	case b.t == kernels.F32:
		return at, nil
	case low == 0:
		return d.stage, elementwise(c, "cast_bf16_f32", count, d.stage, at)
	}
	return d.stage, c.launch("join_master", size2{clamp(ceil(count, 2048), 1, 2112), 1}, size2{256, 1}, 0, d.stage, at, low+address(2*from), int64(count))
}

// DownloadMasters implements kernels.Rounder.
func (d *Device) DownloadMasters(dst []float32, p, rem kernels.Buffer) error {
	const op = "download"
	b, low := weights(op, len(dst), p, rem)
	return d.stream(op, raw(dst), len(dst), 4, func(c driver, from, count int) (address, error) { return d.join(c, b, low, from, count) })
}

// DownloadRounded implements kernels.Rounder. The card joins and rounds, so that
// two bytes a value cross the bus.
func (d *Device) DownloadRounded(dst []uint16, p, rem kernels.Buffer) (finite bool, err error) {
	const op = "download"
	b, low := weights(op, len(dst), p, rem)
	// In the stage: a chunk as float32, as bfloat16, and the lowest index that is not finite.
	half, first := d.stage+4*streamChunk, d.stage+6*streamChunk
	d.enqueue(of(op, "clear"), func(c driver) error { return c.fill(first, 0xff, 8) })
	err = d.stream(op, raw(dst), len(dst), 2, func(c driver, from, count int) (address, error) {
		at := b.at + address(2*from)
		if b.t == kernels.F32 || low != 0 {
			wide, err := d.join(c, b, low, from, count)
			if err == nil {
				err = elementwise(c, "cast_f32_bf16", count, half, wide)
			}
			if err != nil {
				return 0, err
			}
			at = half
		}
		return at, c.launch("first_not_finite_bf16", size2{clamp(ceil(count, 2048), 1, 2112), 1}, size2{256, 1}, 0, first, at, int64(count))
	})
	if err != nil {
		return false, err
	}
	err = d.q.call(command{label: of(op, "finite"), run: func(c driver) error {
		if err := c.download(d.down[:8], first); err != nil {
			return err
		}
		return c.sync()
	}})
	if err != nil {
		return false, err
	}
	for _, b := range d.down[:8] {
		if b != 0xff {
			return false, nil
		}
	}
	return true, nil
}
