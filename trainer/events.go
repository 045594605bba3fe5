package trainer

import (
	"context"
	"encoding/json"
	"sync"
	"time"
)

// Event is one thing that happened to a job.
type Event struct {
	ID   uint64          // grows within a job and over restarts, without meaning otherwise
	Type string          // "state", "step", "checkpoint", or "gap" when events were missed
	Data json.RawMessage // the state, step record or manifest
}

// eventRing keeps the newest events of a job for readers that come back.
type eventRing struct {
	mu     sync.Mutex
	next   uint64 // id of the next event
	ring   []Event
	size   int
	notify chan struct{} // closed and replaced at each event
	closed bool
}

// newEventRing starts ids at the wall clock in microseconds, so that ids of a
// restarted server are greater than those it gave out before.
func newEventRing(size int) *eventRing {
	return &eventRing{next: uint64(time.Now().UnixMicro()), size: size, notify: make(chan struct{})}
}

// publish appends an event. v must marshal to JSON.
func (r *eventRing) publish(kind string, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		panic("trainer: event does not marshal: " + err.Error())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ring = append(r.ring, Event{ID: r.next, Type: kind, Data: data})
	r.next++
	if len(r.ring) > r.size {
		r.ring = append(r.ring[:0:0], r.ring[len(r.ring)-r.size:]...)
	}
	close(r.notify)
	r.notify = make(chan struct{})
}

// close ends all readers after the events they have not seen.
func (r *eventRing) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.closed = true
		close(r.notify)
		r.notify = make(chan struct{})
	}
}

// read calls f for every event after the given id (0: only new ones) until f
// fails, ctx ends or the ring is closed. When events after the id are no longer
// kept, f first gets a "gap" event that says which id comes next.
func (r *eventRing) read(ctx context.Context, after uint64, f func(Event) error) error {
	r.mu.Lock()
	if after == 0 {
		after = r.next - 1
	}
	r.mu.Unlock()
	for {
		r.mu.Lock()
		oldest := r.next - uint64(len(r.ring))
		var out []Event
		if after+1 < oldest {
			data, _ := json.Marshal(map[string]uint64{"after": after, "next": oldest})
			out = append(out, Event{ID: oldest - 1, Type: "gap", Data: data})
			after = oldest - 1
		} else if after >= r.next {
			after = r.next - 1 // an id that was never given out: only what is new
		}
		out = append(out, r.ring[after+1-oldest:]...)
		after = r.next - 1
		notify, closed := r.notify, r.closed
		r.mu.Unlock()

		for _, e := range out {
			if err := f(e); err != nil {
				return err
			}
		}
		if closed {
			return nil
		}
		select {
		case <-notify:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
