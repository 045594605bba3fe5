package trainer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"testing"
	"time"

	"trainerd/internal/fault"
)

// TestAdmit holds the rule of admission: alone on the device, and together
// either there or in host memory.
func TestAdmit(t *testing.T) {
	for _, tc := range []struct {
		name               string
		total, state, free int64
		host               int64
		ok, alone          bool
		room               int64
	}{
		{"fits beside", 30, 10, 30, 0, true, false, 100},
		{"does not fit beside, no host memory", 31, 10, 30, 0, false, false, 30},
		{"takes turns", 31, 10, 30, 60, true, false, 100},
		{"host memory one byte short", 31, 10, 30, 59, false, false, 30},
		{"never fits", 101, 10, 30, 1000, false, true, 100},
		{"others took memory since the start", 91, 10, 20, 1000, false, true, 90},
	} {
		r := newResidence(100, tc.host, 0)
		r.homes["resident"] = &home{total: 70, state: 50, resident: true}
		room, alone, ok := r.admit("new", tc.total, tc.state, tc.free)
		if room != tc.room || alone != tc.alone || ok != tc.ok {
			t.Errorf("%s: room %d, alone %v, ok %v; expected %d, %v, %v", tc.name, room, alone, ok, tc.room, tc.alone, tc.ok)
		}
		if _, kept := r.homes["new"]; kept != tc.ok {
			t.Errorf("%s: a place is kept: %v", tc.name, kept)
		}
	}
}

// TestSpare: what is promised counts, whether it is on the device yet or not.
func TestSpare(t *testing.T) {
	r := newResidence(100, 0, 0)
	r.homes["loaded"] = &home{total: 30, resident: true}
	r.homes["loading"] = &home{total: 20}
	for _, tc := range []struct{ free, want int64 }{
		{100, 50}, // a job's pages that were never touched look free
		{70, 50},  // 30 allocated, 20 promised
		{40, 20},  // somebody else took 30
		{10, 0},
	} {
		if got := r.spare(tc.free); got != tc.want {
			t.Errorf("%d free leave %d, expected %d", tc.free, got, tc.want)
		}
	}
	r.drop("loading")
	if got := r.spare(70); got != 70 {
		t.Errorf("%d after a place was given up, expected 70", got)
	}
}

// TestVictims: the least recently used leave, and no more of them than needed.
func TestVictims(t *testing.T) {
	r := newResidence(100, 1000, 0)
	for _, id := range []JobID{"a", "b", "c", "new"} {
		r.homes[id] = &home{total: 30}
	}
	for _, id := range []JobID{"a", "b", "c"} {
		r.arrived(id)
	}
	r.touch("a")
	if v := r.victim("new", false); v != "b" {
		t.Errorf("victim %q, expected b", v)
	}
	r.left("b")
	if v := r.victim("new", false); v != "" {
		t.Errorf("victim %q although the job fits", v)
	}
	if v := r.victim("new", true); v != "c" {
		t.Errorf("victim %q when memory is in pieces, expected c", v)
	}
	r.arrived("new")
	if v := r.victim("new", false); v != "" {
		t.Errorf("victim %q for a job that is there", v)
	}
}

// TestHold: jobs that fit one at a time keep the device for the hold time while
// they have work, give it up at once when they rest, and share it by weight all
// the same.
func TestHold(t *testing.T) {
	const stay = 10 * time.Second
	e := newClocked(t, patient)
	r := newResidence(100, 1000, stay)
	r.now = func() time.Time { return e.clock }
	e.barred = r.barred
	weights := map[JobID]int64{"a": 30, "b": 10}
	for id, w := range weights {
		e.Weigh(id, w)
		r.homes[id] = &home{total: 60, state: 20}
	}
	release := hold(t, e.executor)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	var came time.Time
	var last JobID
	swaps, began := 0, e.clock
	for id := range weights {
		depth := e.Depth()
		wg.Go(func() {
			for ctx.Err() == nil {
				e.do(ctx, lane{id, laneTrain}, &work{model: true, run: func() error {
					for v := r.victim(id, false); v != ""; v = r.victim(id, false) {
						r.left(v)
					}
					if last != id {
						if held := e.clock.Sub(came); last != "" && held < stay {
							t.Errorf("%s left after %v, expected at least %v", last, held, stay)
						}
						r.arrived(id)
						last, came = id, e.clock
						swaps++
					}
					e.clock = e.clock.Add(time.Second)
					e.used[id] += time.Second
					if e.clock.Sub(began) >= 400*time.Second {
						stop()
					}
					return nil
				}})
			}
			e.Rest(id)
		})
		for e.Depth() == depth {
			runtime.Gosched()
		}
	}
	release()
	wg.Wait()
	if swaps < 4 {
		t.Errorf("%d swaps in 400 s: the other job starved", swaps)
	}
	// a leads by its account until b gets in, which then holds on: at most a hold
	// and a piece of each, over their weights, apart.
	a, b := e.used["a"].Seconds()/30, e.used["b"].Seconds()/10
	if bound := 11.0/30 + 11.0/10; max(a-b, b-a) > bound {
		t.Errorf("a used %v, b %v: %.2f and %.2f over weight, more than %.2f apart", e.used["a"], e.used["b"], a, b, bound)
	}

	// A job that rests does not hold the device.
	if r.barred("a", func(JobID) bool { return false }) || r.barred("b", func(JobID) bool { return false }) {
		t.Error("a job without work bars another")
	}
}

// TestLostDevice finds the code anywhere in a tree of errors.
func TestLostDevice(t *testing.T) {
	lost := fault.New(fault.Internal, codeLost, "illegal address")
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{errReload, false},
		{errors.New("device_lost"), false},
		{lost, true},
		{fmt.Errorf("run step 3: %w", lost), true},
		{errors.Join(errors.New("close"), fmt.Errorf("evict: %w", lost)), true},
		{&fault.Error{Kind: fault.Unavailable, Code: "publish_failed", Err: lost}, true},
	} {
		if got := lostDevice(tc.err); got != tc.want {
			t.Errorf("%v: %v, expected %v", tc.err, got, tc.want)
		}
	}
}

// TestBlame: a loss fails the job whose work it showed in, unless nothing has
// worked since the device was opened; then the same job's next one does.
func TestBlame(t *testing.T) {
	lost := fault.New(fault.Internal, codeLost, "illegal address")
	a, b := &Job{ID: "a"}, &Job{ID: "b"}
	for _, tc := range []struct {
		name  string
		doing func(m *Manager) error
		fails bool
	}{
		{"its own work", func(m *Manager) error { m.examine(b, nil, true); return m.examine(a, lost, true) }, true},
		{"a transfer", func(m *Manager) error { m.examine(b, nil, true); return m.examine(a, lost, false) }, false},
		{"nothing worked yet", func(m *Manager) error { return m.examine(a, lost, true) }, false},
		{"nothing worked yet, twice", func(m *Manager) error { m.examine(a, lost, true); return m.examine(a, lost, true) }, true},
		{"a card that is broken", func(m *Manager) error { m.examine(b, lost, true); return m.examine(a, lost, true) }, false},
	} {
		m := &Manager{home: newResidence(0, 0, 0)}
		m.log = slog.New(slog.DiscardHandler)
		if err := tc.doing(m); lostDevice(err) != tc.fails || !tc.fails && !errors.Is(err, errReload) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}
