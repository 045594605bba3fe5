package trainer

import (
	"context"
	"fmt"
	"sync"
	"time"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// residence knows which jobs' models are on the device and which are in host
// memory, and which has to leave for another. A job is admitted when its model
// alone fits the device, and either all models fit together or host memory can
// hold the state of all of them (the one that comes back and the one that leaves
// are both there for a moment).
type residence struct {
	device int64         // bytes that models may take together
	host   int64         // bytes of host memory for models off the device; 0: none leaves it
	hold   time.Duration // how long a model that came in keeps the device while its job has work
	now    func() time.Time

	mu    sync.Mutex
	homes map[JobID]*home
	uses  uint64
}

// home is what is promised to a job's model.
type home struct {
	total    int64 // bytes on the device
	state    int64 // bytes in host memory when it is off the device
	resident bool
	used     uint64    // greater: more recently
	since    time.Time // when it came to the device
}

func newResidence(device, host int64, hold time.Duration) *residence {
	return &residence{device: device, host: host, hold: hold, now: time.Now, homes: map[JobID]*home{}}
}

// admit promises a job its place. free is what the device says is free now.
// Refused, alone says that the job does not even fit without the others, and
// room is what it could have had.
func (r *residence) admit(id JobID, total, state, free int64) (room int64, alone, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	room = r.device
	sum, states := total, state
	held := int64(0)
	for other, h := range r.homes {
		if other == id {
			continue
		}
		sum += h.total
		states += h.state
		if h.resident {
			held += h.total
		}
	}
	room = max(0, min(room, free+held)) // others may use the device besides this process
	switch {
	case total > room:
		return room, true, false
	case sum <= room, states <= r.host:
		r.homes[id] = &home{total: total, state: state}
		return room, false, true
	}
	return max(0, room-(sum-total)), false, false
}

// drop gives up a job's place.
func (r *residence) drop(id JobID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.homes, id)
}

// arrived says that a job's model is on the device now.
func (r *residence) arrived(id JobID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.homes[id]; h != nil {
		h.resident, h.since = true, r.now()
		r.uses++
		h.used = r.uses
	}
}

// left says that a job's model is no longer on the device.
func (r *residence) left(id JobID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.homes[id]; h != nil {
		h.resident = false
	}
}

// touch says that a job's model is used.
func (r *residence) touch(id JobID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.homes[id]; h != nil {
		r.uses++
		h.used = r.uses
	}
}

// resident reports whether a job's model is on the device, and its bytes there.
func (r *residence) resident(id JobID) (bytes int64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.homes[id]; h != nil && h.resident {
		return h.total, true
	}
	return 0, false
}

// swapped is the host memory of models that are off the device, at most.
func (r *residence) swapped() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := int64(0)
	for _, h := range r.homes {
		if !h.resident {
			n += h.state
		}
	}
	return n
}

// spare is what the device has left when every job has what it was promised, as
// far as that fits: free is what it says is free now.
func (r *residence) spare(free int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	left := r.device
	for _, h := range r.homes {
		left -= h.total
		if !h.resident {
			free -= h.total
		}
	}
	return max(0, min(free, left))
}

// leaving lists, least recently used first, who must leave the device for a job
// to come. Called with mu held.
func (r *residence) leaving(id JobID) []JobID {
	h := r.homes[id]
	if h == nil || h.resident {
		return nil
	}
	taken := int64(0)
	gone := map[JobID]bool{id: true}
	for other, o := range r.homes {
		if o.resident && other != id {
			taken += o.total
		}
	}
	var out []JobID
	for taken+h.total > r.device {
		next := r.oldest(gone)
		if next == "" {
			break
		}
		gone[next] = true
		taken -= r.homes[next].total
		out = append(out, next)
	}
	return out
}

// oldest is the resident job that was not used for the longest time. Called with mu held.
func (r *residence) oldest(but map[JobID]bool) (id JobID) {
	for other, o := range r.homes {
		if o.resident && !but[other] && (id == "" || o.used < r.homes[id].used) {
			id = other
		}
	}
	return id
}

// barred says that a job must wait, because its model would push out that of a
// job which came in less than hold ago and competes for the device.
func (r *residence) barred(id JobID, competes func(JobID) bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, other := range r.leaving(id) {
		if r.now().Sub(r.homes[other].since) < r.hold && competes(other) {
			return true
		}
	}
	return false
}

// victim names who leaves next so that a job fits; "" when nobody has to. With
// more, somebody has to although the sum fits: memory may be in pieces, or used by others.
func (r *residence) victim(id JobID, more bool) JobID {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.leaving(id); len(l) > 0 {
		return l[0]
	}
	if more {
		return r.oldest(map[JobID]bool{id: true})
	}
	return ""
}

// makeRoom brings models to host memory until one of a job's size fits, then
// calls use, and again with less on the device when that found too little
// memory. Called on the device's goroutine.
func (m *Manager) makeRoom(id JobID, use func() error) error {
	for more := false; ; {
		for {
			v := m.home.victim(id, more)
			if v == "" {
				break
			}
			if err := m.evict(v, id); err != nil {
				return err
			}
			more = false
		}
		err := use()
		if fault.KindOf(err) == fault.TooLarge && m.captures.dropIdle() {
			continue
		}
		if fault.KindOf(err) != fault.TooLarge || m.home.victim(id, true) == "" {
			return err
		}
		more = true
	}
}

// evict brings a job's model to host memory.
func (m *Manager) evict(id, other JobID) error {
	j, err := m.Job(id)
	if err != nil {
		return err
	}
	began := time.Now()
	if j.model != nil && !j.model.Evicted() {
		if err := j.model.Evict(); err != nil {
			return fmt.Errorf("make room for job %s: job %s: %w", other, id, err)
		}
	}
	m.home.left(id)
	m.captures.drop(id) // host memory is for the models now
	took := time.Since(began)
	j.mu.Lock()
	j.counts.SwapsOut++
	j.counts.SwapSeconds += took.Seconds()
	j.mu.Unlock()
	m.log.Info("model leaves the device", "job", id, "for", other, "seconds", took.Seconds())
	return nil
}

// bring makes sure that a job's model, if it has one, is on the device. Called
// on the device's goroutine.
func (m *Manager) bring(j *Job) error {
	if j.model == nil || !j.model.Evicted() {
		m.home.touch(j.ID)
		return nil
	}
	began := time.Now()
	if err := m.makeRoom(j.ID, j.model.Restore); err != nil {
		return err
	}
	m.home.arrived(j.ID)
	took := time.Since(began)
	j.mu.Lock()
	j.counts.SwapsIn++
	j.counts.SwapSeconds += took.Seconds()
	j.mu.Unlock()
	m.log.Info("model is back on the device", "job", j.ID, "seconds", took.Seconds())
	return nil
}

// withModel runs a piece of the job's work on the device with its model there.
// Work that finds no model (an ended job's) has to say so itself.
func (j *Job) withModel(ctx context.Context, class laneClass, run func() error) error {
	m := j.m
	err := m.exec.do(ctx, lane{j.ID, class}, &work{model: true, run: func() error {
		if j.isLost() {
			return errReload
		}
		if err := m.bring(j); err != nil {
			return m.examine(j, err, false)
		}
		return m.examine(j, guard(run), true)
	}})
	if lostDevice(err) { // examine said that it was this job's doing
		j.fail(err)
		j.poke()
	}
	return err
}

// device returns the device, opened anew if it was lost. Called on the device's goroutine.
func (m *Manager) device() (kernels.Device, error) {
	m.mu.Lock()
	dev := m.dev
	m.mu.Unlock()
	if dev != nil {
		return dev, nil
	}
	return m.reopen()
}

// settleIn loads the job's model onto the device, with room made for it.
func (j *Job) settleIn(ctx context.Context, load func(kernels.Device) error) error {
	m := j.m
	return m.exec.do(ctx, lane{j.ID, laneTrain}, &work{model: true, run: func() error {
		dev, err := m.device()
		if err != nil {
			return err
		}
		err = guard(func() error { return m.makeRoom(j.ID, func() error { return load(dev) }) })
		if err == nil {
			m.home.arrived(j.ID)
		}
		return m.examine(j, err, false)
	}})
}
