package cuda

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"trainerd/kernels"
)

var _ kernels.Pinner = (*Device)(nil)

// pins is the host memory that the card may write to, beside the device's own.
type pins struct {
	mu     sync.Mutex // held while the owner is asked, so that Close finds nothing half done
	known  map[*byte][]byte
	closed bool
}

// Pin implements kernels.Pinner. The driver locks the pages now, which takes long
// for gigabytes: it is for memory that is written to again and again.
func (d *Device) Pin(host []byte) (unpin func(), err error) {
	if len(host) == 0 || uintptr(unsafe.Pointer(unsafe.SliceData(host)))%uintptr(os.Getpagesize()) != 0 {
		return nil, fmt.Errorf("pin %d bytes: expected memory that starts at a page", len(host))
	}
	p := &d.pins
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errors.New("pin: the device is closed")
	}
	var failed error
	_ = d.q.call(command{label: of("pin", "%d bytes", len(host)), always: true, run: func(c driver) error {
		if failed = c.register(host); failed != nil && c.lost(failed) {
			return failed
		}
		return nil // nothing is wrong with the device
	}})
	if failed != nil {
		return nil, fmt.Errorf("pin %d bytes: %w", len(host), failed)
	}
	if p.known == nil {
		p.known = map[*byte][]byte{}
	}
	first := unsafe.SliceData(host)
	p.known[first] = host
	return sync.OnceFunc(func() { d.unpin(first) }), nil
}

func (d *Device) unpin(first *byte) {
	p := &d.pins
	p.mu.Lock()
	defer p.mu.Unlock()
	host, ok := p.known[first]
	if !ok {
		return // Close did it
	}
	delete(p.known, first)
	_ = d.q.call(command{label: of("unpin", "%d bytes", len(host)), always: true, run: func(c driver) error {
		err := c.sync()
		if failed := c.unregister(host); failed != nil && c.lost(failed) {
			err = failed
		}
		return err // else the pages stay locked, which harms no other work
	}})
}

// closePins takes all pins from the device, which is about to be closed: their
// memory is for the owner to let go.
func (d *Device) closePins() (all [][]byte) {
	p := &d.pins
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, host := range p.known {
		all = append(all, host)
	}
	p.known, p.closed = nil, true
	return all
}

// pinned says whether the card may write to host memory.
func (d *Device) pinned(x []byte) bool {
	p := &d.pins
	p.mu.Lock()
	defer p.mu.Unlock()
	at := uintptr(unsafe.Pointer(unsafe.SliceData(x)))
	for first, host := range p.known {
		if from := uintptr(unsafe.Pointer(first)); at >= from && at+uintptr(len(x)) <= from+uintptr(len(host)) {
			return true
		}
	}
	return false
}

// wait waits for all that was enqueued, behind an error too: memory of the caller's
// that the card writes is his again when it returns.
func (d *Device) wait(op string) error {
	return d.q.call(command{label: of(op, "wait"), always: true, run: func(c driver) error { return c.sync() }})
}
