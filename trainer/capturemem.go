package trainer

import (
	"fmt"
	"sync"

	"trainerd/kernels"
	"trainerd/kernels/hostmem"
)

// captureBudget bounds the host memory that all captures of a server take, and
// keeps that of each job from one capture to the next: memory that is new costs
// a page fault for every page before anything can be copied there.
//
// A span is with one publication from take to give, and nobody else's meanwhile,
// so that a capture never overwrites what is still being written; between two it
// is the job's, idle, and goes when the job does, when its model leaves the
// device, or when somebody else needs the room.
type captureBudget struct {
	limit int64

	mu    sync.Mutex
	used  int64 // of spans, idle or not
	spans map[JobID]*captureSpan
}

// captureSpan is the memory of a job's captures.
type captureSpan struct {
	span   *hostmem.Span
	flying bool // a publication has it
	leaves bool // it goes when that one has landed

	asked kernels.Device // that the memory was made known to, whether or not it took it; nil: none
	unpin func()         // nil: it is not known to it
}

func (s *captureSpan) bytes() int64 { return int64(len(s.span.Bytes)) }

// take gives a job n bytes for one capture. free is how much more the host may
// be asked for; why says what n bytes are too many for, or that the job's memory
// is with another publication. The bytes are those of the capture before.
func (b *captureBudget) take(id JobID, n int64, free func() int64) (raw []byte, why string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.spans[id]
	switch {
	case s != nil && s.flying:
		return nil, "the capture before is still being written"
	case s != nil && s.bytes() >= n:
		s.flying, s.leaves = true, false
		return s.span.Bytes[:n:n], ""
	}
	b.dropLocked(id) // too small
	for b.used > b.limit-n && b.dropIdleLocked() {
	}
	if n > b.limit-b.used {
		return nil, fmt.Sprintf("a capture of %d bytes is over the limit of %d (max_capture_bytes) with %d in use", n, b.limit, b.used)
	}
	for free() < n && b.dropIdleLocked() {
	}
	if room := free(); n > room {
		return nil, fmt.Sprintf("a capture of %d bytes does not fit: the host has %d free", n, room)
	}
	span, err := hostmem.Take(n, hostmem.Small)
	if err != nil {
		return nil, fmt.Sprintf("a capture of %d bytes does not fit: %v", n, err)
	}
	if b.spans == nil {
		b.spans = map[JobID]*captureSpan{}
	}
	b.spans[id] = &captureSpan{span: span, flying: true}
	b.used += n
	return span.Bytes, ""
}

// pin makes the memory of a job's capture, which the job has taken, known to the
// device that is to write to it: once for a device, since it takes long. An error is
// of that one time, and the capture goes on without.
func (b *captureBudget) pin(id JobID, dev kernels.Device) error {
	p, ok := dev.(kernels.Pinner)
	if !ok {
		return nil
	}
	b.mu.Lock()
	s := b.spans[id]
	b.mu.Unlock()
	if s.asked == dev || s.bytes() < hostmem.Large { // smaller memory is the Go heap's
		return nil
	}
	s.release() // by the device before, which is closed
	s.asked = dev
	var err error
	if s.unpin, err = p.Pin(s.span.Bytes); err != nil {
		s.unpin = nil
		return fmt.Errorf("pin %d bytes of a capture's memory: %w", s.bytes(), err)
	}
	return nil
}

// release takes the memory from the device that knows it.
func (s *captureSpan) release() {
	if s.unpin != nil {
		s.unpin()
	}
	s.asked, s.unpin = nil, nil
}

// give ends the use of a job's memory by a publication, which must not touch it any more.
func (b *captureBudget) give(id JobID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.spans[id]
	if s == nil || !s.flying {
		panic("trainer: capture memory of job " + string(id) + " given back twice")
	}
	s.flying = false
	if s.leaves {
		b.dropLocked(id)
	}
}

// drop gives a job's memory back to the system, once no publication has it.
func (b *captureBudget) drop(id JobID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dropLocked(id)
}

// dropIdle gives back all memory that no publication has, and says whether there was any.
func (b *captureBudget) dropIdle() (dropped bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.dropIdleLocked() {
		dropped = true
	}
	return dropped
}

func (b *captureBudget) dropLocked(id JobID) {
	s := b.spans[id]
	switch {
	case s == nil:
	case s.flying:
		s.leaves = true
	default:
		b.used -= s.bytes()
		s.release()
		s.span.Free()
		delete(b.spans, id)
	}
}

// dropIdleLocked gives back one span that no publication has; false for none.
func (b *captureBudget) dropIdleLocked() bool {
	for id, s := range b.spans {
		if !s.flying {
			b.dropLocked(id)
			return true
		}
	}
	return false
}
