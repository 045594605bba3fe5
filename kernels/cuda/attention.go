package cuda

import (
	"fmt"
	"math"
	"slices"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/kernels/internal/seal"
)

// layout is a micro-batch's segments with room in an arena for their schedule,
// which is made when the first attention says for how many heads.
type layout struct {
	seal.Mark
	segments []kernels.Segment
	at       address // room for `most` ints
	most     int
	s        *Schedule
	h, kv    int
	backward bool
	parts    scheduleParts
}

func (l *layout) Segments() []kernels.Segment { return l.segments }

// scheduleParts is where the arrays of a schedule are on the card.
type scheduleParts struct{ tiles, items, combines, order, works, ranges, splits address }

// layoutInts bounds the ints of any schedule of so many segments and query rows
// whose key blocks are seen in at most two ways by runs of neighbouring
// segments, which is so when completions follow their prompt.
func layoutInts(segments, t int) int {
	tiles := t // none is empty
	pieces := MaxPartRows(1)
	blocks := 4*segments + t/tileRows + 1
	return 8*tiles + 12*(tiles+pieces) + 4*min(tiles, segments) + tiles + 8*(blocks+MaxSlots) + 4*(3*blocks+2*MaxSlots) + 4*MaxSlots
}

// LayoutScratch implements kernels.Scratcher.
func (d *Device) LayoutScratch(segments, t int) int64 {
	return kernels.Round(4*int64(layoutInts(segments, t)), alignment)
}

// Layout implements kernels.Device.
func (d *Device) Layout(a kernels.Arena, segments []kernels.Segment) kernels.Layout {
	const op = "layout"
	t := 0
	for i, s := range segments {
		must(s.Q >= 0 && s.QLen >= 0 && s.K >= 0 && s.KLen >= 0 && s.Prefix >= 0 && s.PrefixLen >= 0, op, "segment %d is %+v, expected nothing negative", i, s)
		t += int(s.QLen)
	}
	most := layoutInts(len(segments), t)
	return &layout{segments: slices.Clone(segments), at: a.Alloc(kernels.I32, most).(*buffer).at, most: most}
}

// schedule returns a layout's schedule for a number of heads and puts it on the
// card where it is not there yet. extra is memory to give back after the launches, or 0.
func (d *Device) schedule(op string, l *layout, h, kv int, backward bool) (extra address) {
	if l.s != nil && l.h == h && l.kv == kv && (l.backward || !backward) {
		return 0
	}
	s := NewSchedule(l.segments, h, kv, backward)
	at := l.at
	if s.Ints() > l.most {
		var err error
		if at, err = d.take("attention schedule", int64(4*s.Ints())); err != nil {
			d.enqueue(of(op, "a schedule of %d ints", s.Ints()), func(driver) error { return err })
			return 0
		}
		extra = at
	}
	all := make([]int32, 0, s.Ints())
	for _, x := range []struct {
		part *address
		ints []int32
	}{
		{&l.parts.tiles, s.Tiles}, {&l.parts.items, s.Items}, {&l.parts.combines, s.Combines}, {&l.parts.works, s.Works},
		{&l.parts.ranges, s.Ranges}, {&l.parts.splits, s.Splits}, {&l.parts.order, s.Order}, // the one of single ints last: all others stay at 16 bytes
	} {
		*x.part = at + address(4*len(all))
		all = append(all, x.ints...)
	}
	d.send(op, at, raw(all), false)
	l.s, l.h, l.kv, l.backward = s, h, kv, backward
	return extra
}

// release gives back a schedule that did not fit into its layout's room.
func (d *Device) release(l *layout, extra address) {
	if extra != 0 {
		d.give(extra)
		l.s = nil
	}
}

// strided returns where a matrix starts and checks its stride.
func strided(op, name string, s kernels.Strided, width int) address {
	b := span(op, name, s.Buf, kernels.BF16)
	must(s.Stride >= width && s.Off >= 0, op, "%s has rows of %d elements %d apart from %d on", name, width, s.Stride, s.Off)
	return skip(b.at, s.Off, 2)
}

// aligned reports whether the tensor-core kernels may be used: head dimension, 16-byte rows and starts.
func aligned(hd int, at []address, strides ...int) bool {
	if hd != 64 && hd != 128 {
		return false
	}
	for _, a := range at {
		if a%16 != 0 {
			return false
		}
	}
	for _, s := range strides {
		if s%8 != 0 {
			return false
		}
	}
	return true
}

// Values of Options.Attention: which products the tensor-core attention kernels use.
const (
	AttentionMMA   = "mma"   // mma.sync, on every card
	AttentionWgmma = "wgmma" // of warpgroups, on compute capability 9.0 alone
)

// chooseAttention takes the option, where the card has what it names.
func (d *Device) chooseAttention(c driver, o Options) error {
	const field = "cuda_attention"
	switch o.Attention {
	case "", AttentionMMA:
	case AttentionWgmma:
		if !c.has("attention_forward_64_wgmma") {
			return fault.BadField(field, o.Attention, fmt.Sprintf("%s: wgmma needs compute capability 9.0, and there is no such kernel for %s (%s)", AttentionMMA, d.info.Name, d.info.Model))
		}
		d.wgmma = true
	default:
		return fault.BadField(field, o.Attention, AttentionMMA+" or "+AttentionWgmma)
	}
	return nil
}

// attentionKernel returns the kernel of a family for a head dimension, its dynamic
// shared memory and what its parameters end with.
func (d *Device) attentionKernel(family string, hd int, fast bool) (name string, shared int, tail []any) {
	if !fast {
		return family + "_simple", 0, []any{int32(hd)}
	}
	shared = map[string]int{"attention_forward": 40960, "attention_dkv": 50688, "attention_dq": 49152}[family]
	name = family + "_64"
	if hd == 128 {
		name, shared = family+"_128", 2*shared
		if family == "attention_dkv" {
			return name, 99840, nil // the numbers of a query tile's rows do not grow with it, and there is no other kernel
		}
	}
	if d.wgmma {
		name, shared = name+"_wgmma", shared+1008 // tiles start at a multiple of 1,024 bytes
		if family == "attention_dkv" {
			shared += 512 // two stages end at one
		}
	}
	return name, shared, nil
}

// maxHeadDim is the widest head of the simple kernels.
const maxHeadDim = 256

func checkHeads(op string, t, h, kv, hd int) {
	must(t >= 0 && h > 0 && kv > 0 && h%kv == 0 && h/kv <= tileRows && hd > 0 && hd <= maxHeadDim, op,
		"T %d H %d KV %d hd %d, expected H a multiple of KV, at most %d times it, and hd at most %d", t, h, kv, hd, tileRows, maxHeadDim)
}

// AttentionScratch implements kernels.Scratcher.
func (d *Device) AttentionScratch(t, h, kv, hd int, backward bool) int64 {
	floats := func(n int) int64 { return kernels.Round(4*int64(n), alignment) }
	if backward {
		return floats(t*h) + floats(MaxSlots*kv*2*tileRows*hd)
	}
	rows := kv * MaxPartRows(kv)
	return floats(rows*hd) + floats(rows*2)
}

// Attention implements kernels.Device.
func (d *Device) Attention(x kernels.Attention) {
	const op = "attention"
	checkHeads(op, x.T, x.H, x.KV, x.HD)
	out, lse := place(op, "Out", x.Out, x.T*x.H*x.HD, kernels.BF16), placeOr0(op, "LSE", x.LSE, x.T*x.H, kernels.F32)
	q := strided(op, "Q", x.Q, x.H*x.HD)
	k, v, pk, pv := strided(op, "K", x.K, x.KV*x.HD), strided(op, "V", x.V, x.KV*x.HD), strided(op, "PK", x.PK, x.KV*x.HD), strided(op, "PV", x.PV, x.KV*x.HD)
	l := x.Layout.(*layout)
	if x.T == 0 {
		return
	}
	extra := d.schedule(op, l, x.H, x.KV, false)
	defer d.release(l, extra)
	s, parts := l.s, l.parts
	if s == nil || len(s.Items) == 0 {
		return
	}
	var partO, partML address
	if s.PartRows > 0 {
		must(x.Scratch != nil, op, "Scratch is nil")
		mark := x.Scratch.Mark()
		defer x.Scratch.Release(mark)
		partO = x.Scratch.Alloc(kernels.F32, x.KV*s.PartRows*x.HD).(*buffer).at
		partML = x.Scratch.Alloc(kernels.F32, x.KV*s.PartRows*2).(*buffer).at
	}
	fast := aligned(x.HD, []address{out, q, k, v, pk, pv}, x.Q.Stride, x.K.Stride, x.V.Stride, x.PK.Stride, x.PV.Stride)
	kernel, shared, tail := d.attentionKernel("attention_forward", x.HD, fast)
	args := append([]any{
		out, lse, q, k, v, pk, pv, int32(x.Q.Stride), int32(x.K.Stride), int32(x.V.Stride), int32(x.PK.Stride), int32(x.PV.Stride), parts.items, partO, partML,
		int32(s.PartRows), int32(x.H), int32(x.KV), softmaxScale(x.HD),
	}, tail...)
	items, combines := len(s.Items)/12, len(s.Combines)/4
	d.enqueue(of(op, "T %d H %d KV %d hd %d, %d items", x.T, x.H, x.KV, x.HD, items), func(c driver) error {
		if err := c.launch(kernel, size2{items, x.KV}, size2{128, 1}, shared, args...); err != nil || combines == 0 {
			return err
		}
		return c.launch("attention_combine", size2{combines, x.KV}, size2{128, 1}, 0, out, lse, partO, partML, parts.combines,
			int32(s.PartRows), int32(x.H), int32(x.KV), int32(x.HD))
	})
}

func softmaxScale(hd int) float32 { return float32(1 / math.Sqrt(float64(hd))) }

// AttentionBackward implements kernels.Device.
func (d *Device) AttentionBackward(x kernels.AttentionBackward) {
	const op = "attention backward"
	checkHeads(op, x.T, x.H, x.KV, x.HD)
	w, hw := (x.H+2*x.KV)*x.HD, x.H*x.HD
	dqkv, qkv := place(op, "DQKV", x.DQKV, x.T*w, kernels.BF16), place(op, "QKV", x.QKV, x.T*w, kernels.BF16)
	dout, out, lse := place(op, "DOut", x.DOut, x.T*hw, kernels.BF16), place(op, "Out", x.Out, x.T*hw, kernels.BF16), place(op, "LSE", x.LSE, x.T*x.H, kernels.F32)
	l := x.Layout.(*layout)
	if x.T == 0 {
		return
	}
	extra := d.schedule(op, l, x.H, x.KV, true)
	defer d.release(l, extra)
	d.fill(op, dqkv, 2*int64(x.T)*int64(w)) // rows that no segment covers
	s, parts := l.s, l.parts
	if s == nil || len(s.Order) == 0 {
		return
	}
	must(x.Scratch != nil, op, "Scratch is nil")
	mark := x.Scratch.Mark()
	defer x.Scratch.Release(mark)
	delta := x.Scratch.Alloc(kernels.F32, x.T*x.H).(*buffer).at
	var part address
	if s.Slots > 0 {
		part = x.Scratch.Alloc(kernels.F32, s.Slots*x.KV*2*tileRows*x.HD).(*buffer).at
	}
	fast := aligned(x.HD, []address{dqkv, qkv, dout}, w)
	h, kv, scale := int32(x.H), int32(x.KV), softmaxScale(x.HD)
	dkv, dkvShared, tail := d.attentionKernel("attention_dkv", x.HD, fast)
	dq, dqShared, _ := d.attentionKernel("attention_dq", x.HD, fast)
	dkvArgs := append([]any{dqkv, part, qkv, dout, lse, delta, parts.works, parts.ranges, parts.tiles, h, kv, scale}, tail...)
	dqArgs := append([]any{dqkv, qkv, dout, lse, delta, parts.tiles, parts.order, h, kv, scale}, tail...)
	tiles, works, splits, rows := len(s.Order), len(s.Works)/8, len(s.Splits)/4, x.T*x.H
	d.enqueue(of(op, "T %d H %d KV %d hd %d, %d tiles, %d works", x.T, x.H, x.KV, x.HD, tiles, works), func(c driver) error {
		if err := c.launch("attention_delta", size2{ceil(rows, 16), 1}, size2{128, 1}, 0, delta, dout, out, int64(rows), int32(x.HD)); err != nil {
			return err
		}
		if works > 0 {
			if err := c.launch(dkv, size2{works, x.KV}, size2{128, 1}, dkvShared, dkvArgs...); err != nil {
				return err
			}
		}
		if splits > 0 {
			if err := c.launch("attention_dkv_reduce", size2{splits, x.KV}, size2{256, 1}, 0, dqkv, part, parts.splits, h, kv, int32(x.HD)); err != nil {
				return err
			}
		}
		return c.launch(dq, size2{tiles, x.KV}, size2{128, 1}, dqShared, dqArgs...)
	})
}
