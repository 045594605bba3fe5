package trainer

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"trainerd/internal/fault"
)

// hold occupies the executor until the returned function is called.
func hold(t *testing.T, e *executor) (release func()) {
	t.Helper()
	started, gate := make(chan struct{}), make(chan struct{})
	go func() {
		e.Do(context.Background(), lane{job: "gate"}, func() error { close(started); <-gate; return nil })
		e.Rest("gate")
	}()
	<-started
	return func() { close(gate) }
}

// clocked is an executor whose pieces take as long as they say.
type clocked struct {
	*executor
	clock time.Time // moved by pieces alone, on the executor's goroutine
	used  map[JobID]time.Duration
	order []string
}

func newClocked(t *testing.T, comeback time.Duration) *clocked {
	c := &clocked{executor: newExecutor(), used: map[JobID]time.Duration{}}
	c.now = func() time.Time { return c.clock }
	c.comeback = comeback
	c.start()
	t.Cleanup(c.Close)
	return c
}

// patient is a comeback for jobs that are workers of a test: one that is late
// must not be taken for one that is gone.
const patient = 20 * time.Second

// piece runs a piece of the given length.
func (c *clocked) piece(ctx context.Context, l lane, took time.Duration, name string) error {
	return c.Do(ctx, l, func() error {
		c.clock = c.clock.Add(took)
		c.used[l.job] += took
		c.order = append(c.order, name)
		return nil
	})
}

// queue hands pieces in one by one while the device is held.
func (c *clocked) queue(wg *sync.WaitGroup, l lane, took time.Duration, name string) {
	depth := c.Depth()
	wg.Go(func() { c.piece(context.Background(), l, took, name) })
	for c.Depth() == depth {
		runtime.Gosched()
	}
}

// TestExecutorShares: jobs that always have work share the device in proportion
// to their weights, whatever the length of their steps; each is off by at most
// one longest piece.
func TestExecutorShares(t *testing.T) {
	for _, tc := range []struct {
		name string
		jobs map[JobID]struct {
			weight int64
			took   time.Duration
		}
	}{
		{"long steps do not starve short ones", map[JobID]struct {
			weight int64
			took   time.Duration
		}{"long": {10, 10 * time.Second}, "short": {10, 30 * time.Millisecond}}},
		{"weights", map[JobID]struct {
			weight int64
			took   time.Duration
		}{"a": {60, time.Second}, "b": {30, 700 * time.Millisecond}, "c": {10, 1300 * time.Millisecond}}},
		{"extremes", map[JobID]struct {
			weight int64
			took   time.Duration
		}{"most": {100, 100 * time.Millisecond}, "least": {1, 400 * time.Millisecond}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := newClocked(t, patient)
			for id, j := range tc.jobs {
				e.Weigh(id, j.weight)
			}
			release := hold(t, e.executor)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var wg sync.WaitGroup
			began := e.clock
			bound := 0.0 // of the difference of two jobs' seconds over weight
			for id, j := range tc.jobs {
				bound = max(bound, 2*j.took.Seconds()/float64(j.weight))
				depth := e.Depth()
				wg.Go(func() {
					for ctx.Err() == nil {
						e.Do(ctx, lane{id, laneTrain}, func() error {
							e.clock = e.clock.Add(j.took)
							e.used[id] += j.took
							passed := e.clock.Sub(began)
							if passed > 100*time.Second {
								stop()
								return nil
							}
							for a, x := range tc.jobs {
								for b, y := range tc.jobs {
									if d := e.used[a].Seconds()/float64(x.weight) - e.used[b].Seconds()/float64(y.weight); d > bound {
										t.Errorf("after %v: %v used %v, %v used %v: %.3f apart, at most %.3f", passed, a, e.used[a], b, e.used[b], d, bound)
										stop()
									}
								}
							}
							return nil
						})
					}
					e.Rest(id)
				})
				for e.Depth() == depth {
					runtime.Gosched()
				}
			}
			release()
			wg.Wait()
			for id := range tc.jobs {
				if e.used[id] == 0 {
					t.Errorf("%v never ran", id)
				}
			}
		})
	}
}

// TestExecutorRequests: a short request runs after the piece under way, not
// after the other job's steps.
func TestExecutorRequests(t *testing.T) {
	e := newClocked(t, 0)
	release := hold(t, e.executor)
	var wg sync.WaitGroup
	for i := range 4 {
		e.queue(&wg, lane{"a", laneTrain}, 10*time.Second, fmt.Sprintf("a%d", i))
	}
	e.queue(&wg, lane{"b", laneTrain}, time.Second, "step")
	for i := range 5 {
		e.queue(&wg, lane{"b", laneRequest}, 300*time.Millisecond, fmt.Sprintf("r%d", i))
	}
	release()
	wg.Wait()
	// r0 goes at once. Then b is behind a by its account, and its lanes alternate,
	// with a request of courtesy between two pieces in turn while there is some left.
	if want := []string{"r0", "a0", "r1", "r2", "r3", "step", "r4", "a1", "a2", "a3"}; !slices.Equal(e.order, want) {
		t.Errorf("order %v, expected %v", e.order, want)
	}
}

// TestExecutorFloodOfRequests: requests never take more of another job's time
// than the courtesy share, however many there are.
func TestExecutorFloodOfRequests(t *testing.T) {
	e := newClocked(t, patient)
	release := hold(t, e.executor)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	began := e.clock
	work := func(l lane, took time.Duration) {
		depth := e.Depth()
		wg.Go(func() {
			for ctx.Err() == nil {
				e.Do(ctx, l, func() error {
					for e.Depth() < 3 && ctx.Err() == nil { // the three others are back: it is a flood
						runtime.Gosched()
					}
					e.clock = e.clock.Add(took)
					e.used[l.job] += took
					if e.clock.Sub(began) > 200*time.Second {
						stop()
					}
					return nil
				})
			}
			e.Rest(l.job)
		})
		for e.Depth() == depth {
			runtime.Gosched()
		}
	}
	work(lane{"train", laneTrain}, time.Second)
	for range 3 {
		work(lane{"ask", laneRequest}, 500*time.Millisecond)
	}
	release()
	wg.Wait()
	// Both have weight 10 and always work: half each of what is not courtesy. The
	// courtesy is a tenth over two accounts, and the second saved up at first.
	total := e.used["train"] + e.used["ask"]
	least := time.Duration((1-courtesyShare)/2*float64(total)) - 3*time.Second
	if e.used["train"] < least {
		t.Errorf("training got %v of %v, expected at least %v", e.used["train"], total, least)
	}
}

// TestExecutorIdleJobSavesNothing: a job that comes back from idling does not
// claim the time that it did not use.
func TestExecutorIdleJobSavesNothing(t *testing.T) {
	e := newClocked(t, 0)
	if err := e.piece(t.Context(), lane{"idle", laneTrain}, time.Second, ""); err != nil {
		t.Fatal(err)
	}
	e.Rest("idle")
	for range 50 {
		if err := e.piece(t.Context(), lane{"busy", laneTrain}, time.Second, ""); err != nil {
			t.Fatal(err)
		}
	}
	release := hold(t, e.executor)
	e.order = nil
	var wg sync.WaitGroup
	for i := range 3 {
		e.queue(&wg, lane{"busy", laneTrain}, time.Second, fmt.Sprintf("busy%d", i))
		e.queue(&wg, lane{"idle", laneTrain}, time.Second, fmt.Sprintf("idle%d", i))
	}
	release()
	wg.Wait()
	if got := e.order[:4]; !slices.Contains(got, "busy0") || !slices.Contains(got, "busy1") {
		t.Errorf("order %v, expected turns", e.order)
	}
}

// TestExecutorWaitsForAnExpectedJob: a job that is next by its account is given
// the moment that its goroutine needs, and no more once it says that it rests.
func TestExecutorWaitsForAnExpectedJob(t *testing.T) {
	e := newClocked(t, patient)
	e.Weigh("first", 100)
	e.Weigh("other", 1)
	release := hold(t, e.executor)
	var wg sync.WaitGroup
	e.queue(&wg, lane{"first", laneTrain}, time.Second, "first0")
	e.queue(&wg, lane{"other", laneTrain}, time.Second, "other0")
	e.queue(&wg, lane{"other", laneTrain}, time.Second, "other1")
	release()
	for e.Depth() > 1 {
		runtime.Gosched()
	}
	// other1 waits although the device is idle: first has used 0.01, other 1.
	time.Sleep(10 * time.Millisecond)
	if e.Depth() != 1 {
		t.Fatal("the device did not wait for the job that is next")
	}
	if err := e.piece(t.Context(), lane{"first", laneTrain}, time.Second, "first1"); err != nil {
		t.Fatal(err)
	}
	e.Rest("first")
	for e.Depth() > 0 {
		runtime.Gosched()
	}
	e.Rest("other")
	wg.Wait()
	if want := []string{"first0", "other0", "first1", "other1"}; !slices.Equal(e.order, want) {
		t.Errorf("order %v, expected %v", e.order, want)
	}
}

func TestExecutorWithdrawsWhatHasNotBegun(t *testing.T) {
	e := newExecutor().start()
	defer e.Close()
	release := hold(t, e)
	ctx, cancel := context.WithCancel(t.Context())
	ran := false
	got := make(chan error)
	go func() { got <- e.Do(ctx, lane{job: "a"}, func() error { ran = true; return nil }) }()
	for e.Depth() == 0 {
	}
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	release()
	if err := e.Do(t.Context(), lane{job: "a"}, func() error { return nil }); err != nil || ran {
		t.Errorf("withdrawn work ran (%v), %v", ran, err)
	}
}

func TestExecutorSurvivesPanicsAndCloses(t *testing.T) {
	e := newExecutor().start()
	err := e.Do(t.Context(), lane{job: "a"}, func() error { panic("boom") })
	if f, ok := fault.As(err); !ok || f.Code != "panic" {
		t.Errorf("error %v, expected a panic fault", err)
	}
	if err := e.Do(t.Context(), lane{job: "a"}, func() error { return nil }); err != nil {
		t.Errorf("after a panic: %v", err)
	}
	e.Close()
	if err := e.Do(t.Context(), lane{job: "a"}, func() error { return nil }); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestEventRing(t *testing.T) {
	r := newEventRing(3)
	first := r.next
	for i := range 5 {
		r.publish("step", i)
	}
	read := func(after uint64) (out []string) {
		stop := errors.New("stop")
		err := r.read(t.Context(), after, func(e Event) error {
			out = append(out, fmt.Sprintf("%s%s", e.Type, e.Data))
			if e.ID == first+4 {
				return stop
			}
			return nil
		})
		if !errors.Is(err, stop) {
			t.Errorf("after %d: %v", after, err)
		}
		return out
	}
	if got, want := read(first+2), []string{"step3", "step4"}; !slices.Equal(got, want) {
		t.Errorf("got %v, expected %v", got, want)
	}
	if got := read(first - 1); len(got) != 4 || got[0] != fmt.Sprintf(`gap{"after":%d,"next":%d}`, first-1, first+2) {
		t.Errorf("got %v, expected a gap and three events", got)
	}
	// An id of a server that ran before is older than all ids of this one.
	if got := read(1); got[0][:3] != "gap" {
		t.Errorf("got %v, expected a gap first", got)
	}
	r.close()
	if err := r.read(t.Context(), first+4, func(Event) error { return errors.New("nothing is new") }); err != nil {
		t.Errorf("closed ring: %v", err)
	}
}

func TestMetricsJSON(t *testing.T) {
	var m Metrics
	if err := m.UnmarshalJSON([]byte(`{"loss":null,"lr":0.5}`)); err != nil {
		t.Fatal(err)
	}
	if m["loss"] == m["loss"] || m["lr"] != 0.5 {
		t.Errorf("metrics %v, expected NaN and 0.5", m)
	}
	raw, err := m.MarshalJSON()
	if err != nil || string(raw) != `{"loss":null,"lr":0.5}` {
		t.Errorf("%s, %v", raw, err)
	}
}
