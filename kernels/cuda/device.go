package cuda

import (
	"errors"
	"fmt"
	"log/slog"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/kernels/internal/seal"
)

const (
	// reserve is what MemFree leaves to the driver: allocations are rounded up to
	// its pages, kernels are loaded when they are first launched.
	reserve = 512 << 20
	// gemmBytes is cuBLASLt's workspace, what its documentation asks for on sm_90.
	gemmBytes = 32 << 20
	// partialBytes holds the partial sums of reductions over rows.
	partialBytes = 32 << 20
	// stageBytes is one of the staging buffers of transfers.
	stageBytes = 8 << 20
	// fetchBytes is the room for downloads that are not waited for: log-probs and
	// entropies of a million predictions.
	fetchBytes = 8 << 20
	// flags are words that kernels lower when an index is out of range.
	flagBytes = 256
)

// Flags by operation.
const (
	flagGather = iota
	flagScatter
	flagTarget
	flagCount
)

var flagNames = [flagCount]string{"gather: rows", "scatter add: an index", "log-prob: Targets"}

// Device is a CUDA card. It implements kernels.Device and kernels.Scratcher.
type Device struct {
	seal.Mark
	q    *queue
	info kernels.Info

	gemmSpace, partials, stage, flags address
	up                                [2][]byte // pinned; slot upSlot is being filled from upAt on
	upSlot, upAt                      int
	down, late                        []byte // pinned
	lateAt                            int    // late is taken by fetches up to here
	fetches                           []fetched
	turns                             map[turnsKey]address
	watch                             stopwatch // the owner's alone; made by the first profile
	choices                           *choices
	pins                              pins
	wgmma                             bool // attention by warpgroup products
}

// Options are what a caller may choose about a card.
type Options struct {
	// Timed chooses cuBLASLt's algorithms by timing them, once per class of
	// products; otherwise each shape takes the library's favourite.
	Timed bool
	// Choices is the file that keeps what timing chose, so that the next process
	// on this machine chooses the same; empty: it is forgotten.
	Choices string
	// Attention is AttentionMMA, AttentionWgmma, or "" for the former.
	Attention string
	// Log gets a warning when the file cannot be used; nil: slog.Default.
	Log *slog.Logger
}

// newDevice starts the owner of a card and takes what the device itself needs.
func newDevice(info kernels.Info, o Options, open func() (driver, error)) (*Device, error) {
	q, err := newQueue(open)
	if err != nil {
		return nil, err
	}
	info.Compute, info.GradType, info.Alignment = kernels.BF16, kernels.F32, alignment
	d := &Device{q: q, info: info, turns: map[turnsKey]address{}}
	var refused, failed error
	_ = q.call(command{label: of("open", ""), run: func(c driver) error {
		if refused = d.chooseAttention(c, o); refused == nil {
			failed = d.reserveSpace(c)
		}
		d.choices = newChoices(o, info.Model, c.library())
		return nil
	}})
	if refused != nil {
		_ = d.Close()
		return nil, refused
	}
	if failed != nil {
		_ = d.Close()
		return nil, fault.New(fault.Unavailable, "device_unavailable", "open %s (%s): %w", info.Name, info.Model, failed)
	}
	return d, nil
}

// reserveSpace takes the device's own buffers. It runs on the owner.
func (d *Device) reserveSpace(c driver) error {
	for _, x := range []struct {
		at    *address
		bytes int64
	}{{&d.gemmSpace, gemmBytes}, {&d.partials, partialBytes}, {&d.stage, stageBytes}, {&d.flags, flagBytes}} {
		var err error
		if *x.at, err = c.alloc(x.bytes); err != nil {
			free, total, _ := c.memory()
			return fmt.Errorf("allocate %d bytes of workspace, %d of %d free: %w", x.bytes, free, total, err)
		}
	}
	for _, x := range []*[]byte{&d.up[0], &d.up[1], &d.down} {
		var err error
		if *x, err = c.pinned(stageBytes); err != nil {
			return fmt.Errorf("allocate %d bytes of pinned host memory: %w", stageBytes, err)
		}
	}
	var err error
	if d.late, err = c.pinned(fetchBytes); err != nil {
		return fmt.Errorf("allocate %d bytes of pinned host memory: %w", fetchBytes, err)
	}
	for i := range d.up {
		if err := c.mark(i); err != nil {
			return err
		}
	}
	return d.clearFlags(c)
}

// clearFlags sets all flags to 0x7f7f7f7f, which is above every index.
func (d *Device) clearFlags(c driver) error { return c.fill(d.flags, 0x7f, flagBytes) }

// flag returns the address of an operation's flag.
func (d *Device) flag(i int) address { return d.flags + address(4*i) }

// Info implements kernels.Device.
func (d *Device) Info() kernels.Info {
	info := d.info
	_ = d.q.call(command{label: of("memory", ""), run: func(c driver) error {
		free, total, err := c.memory()
		info.MemFree, info.MemTotal = max(0, free-reserve), total
		return err
	}})
	return info
}

// Sync implements kernels.Device. Behind an error it waits too, and forgets which
// indices were out of range: the next Sync is about other work.
func (d *Device) Sync() error {
	_ = d.q.call(command{label: of("sync", ""), always: true, run: func(c driver) error {
		if err := c.download(d.down[:flagBytes], d.flags); err != nil {
			return err
		}
		if err := c.sync(); err != nil {
			return err
		}
		for i, name := range flagNames {
			if v := words[int32](d.down)[i]; v != 0x7f7f7f7f {
				if err := d.clearFlags(c); err != nil {
					return err
				}
				return fmt.Errorf("%s[%d] was out of range", name, v)
			}
		}
		return nil
	}})
	err := d.q.take()
	d.handOver(err)
	return err
}

// Close implements kernels.Device. It frees everything, and waits only where host
// memory is pinned, which the card may be writing to.
func (d *Device) Close() error {
	pinned := d.closePins()
	if err := d.q.stop(command{label: of("close", ""), run: func(c driver) error {
		var err error
		if len(pinned) > 0 {
			err = c.sync()
		}
		for _, host := range pinned {
			err = errors.Join(err, c.unregister(host))
		}
		if err != nil && c.lost(err) {
			err = nil // it went with the context
		}
		return errors.Join(err, c.close())
	}}); err != nil {
		return fmt.Errorf("close %s: %w", d.info.Name, err)
	}
	return nil
}

// enqueue appends an operation's launches.
func (d *Device) enqueue(l label, run func(driver) error) { d.q.put(command{label: l, run: run}) }

func ceil(n, by int) int { return (n + by - 1) / by }

func clamp(n, least, most int) int { return max(least, min(n, most)) }

var (
	_ kernels.Device    = (*Device)(nil)
	_ kernels.Scratcher = (*Device)(nil)
)
