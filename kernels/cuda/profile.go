package cuda

import (
	"errors"
	"fmt"
	"strings"

	"trainerd/kernels"
)

// A driver with a clock on its stream is a timer: CUDA's events on a card, the
// processor's clock in the emulator, where everything is done at once.
type timer interface {
	stopwatch() stopwatch
}

// stopwatch takes times on the stream. Like the driver, it is the owner's alone.
type stopwatch interface {
	// start forgets all stamps.
	start()
	// stamp notes when the stream gets here, after all work before it.
	stamp() error
	// read waits for the last stamp and returns the seconds between neighbours,
	// each read on its own, and from the first to the last.
	read() (between []float64, whole float64, err error)
}

// profile times what the owner runs, by a stamp before and one after each
// operation: even stretches are gaps, odd ones operations.
type profile struct {
	watch stopwatch
	each  bool
	names []string
}

// hostOnly tells the commands that put nothing on the stream; what they take counts as a gap.
func hostOnly(op string) bool {
	switch op {
	case "free", "memory", "open", "close", "sync", "profile", "pin", "unpin":
		return true
	}
	return strings.HasPrefix(op, "allocate ")
}

// run is a command's run with stamps around it.
func (p *profile) run(d driver, c *command) error {
	if !p.each || hostOnly(c.label.op) {
		return c.run(d)
	}
	if err := p.watch.stamp(); err != nil {
		return fmt.Errorf("stamp: %w", err)
	}
	p.names = append(p.names, c.label.op)
	err := c.run(d)
	if failed := p.watch.stamp(); err == nil && failed != nil {
		err = fmt.Errorf("stamp: %w", failed)
	}
	return err
}

// StartProfile implements kernels.Profiler. Where the stream runs dry, an
// operation's time holds what it took to launch it.
func (d *Device) StartProfile(each bool) {
	d.q.put(command{label: of("profile", ""), run: func(c driver) error {
		t, ok := c.(timer)
		if !ok {
			return errors.New("this driver has no clock")
		}
		if d.watch == nil {
			d.watch = t.stopwatch()
		}
		d.watch.start()
		d.q.profile = &profile{watch: d.watch, each: each}
		return d.watch.stamp()
	}})
}

// StopProfile implements kernels.Profiler.
func (d *Device) StopProfile() (kernels.Profile, error) {
	var out kernels.Profile
	err := d.q.call(command{label: of("profile", ""), always: true, run: func(driver) error {
		p := d.q.profile
		d.q.profile = nil
		if p == nil {
			return errors.New("none was started")
		}
		if err := p.watch.stamp(); err != nil {
			return err
		}
		between, whole, err := p.watch.read()
		if err != nil {
			return err
		}
		if len(between) != 2*len(p.names)+1 {
			return fmt.Errorf("%d stretches of %d operations", len(between), len(p.names))
		}
		out.Span = whole
		for i, s := range between {
			if i%2 == 0 {
				out.Gaps += s
			} else {
				out.Add(p.names[i/2], s)
			}
		}
		return nil
	}})
	if err != nil {
		return kernels.Profile{}, d.q.take()
	}
	return out, nil
}

var _ kernels.Profiler = (*Device)(nil)
