package trainer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"trainerd/internal/fault"
)

// hold occupies the executor until the returned function is called.
func hold(t *testing.T, e *executor) (release func()) {
	t.Helper()
	started, gate := make(chan struct{}), make(chan struct{})
	go e.Do(context.Background(), lane{job: "gate"}, func() error { close(started); <-gate; return nil })
	<-started
	return func() { close(gate) }
}

func TestExecutorTakesLanesInTurn(t *testing.T) {
	e := newExecutor()
	defer e.Close()
	release := hold(t, e)
	var order []string
	var wg sync.WaitGroup
	push := func(job JobID, class laneClass, name string) {
		depth := e.Depth()
		wg.Add(1)
		go func() {
			defer wg.Done()
			e.Do(context.Background(), lane{job, class}, func() error { order = append(order, name); return nil })
		}()
		for e.Depth() == depth { // the order of arrival is part of the test
		}
	}
	for i := range 4 {
		push("a", laneRequest, fmt.Sprintf("a%d", i))
	}
	push("a", laneTrain, "step")
	push("b", laneRequest, "b0")
	release()
	wg.Wait()
	// A flood in one lane delays another by one piece of each lane.
	if want := []string{"a0", "step", "b0", "a1", "a2", "a3"}; !slices.Equal(order, want) {
		t.Errorf("order %v, expected %v", order, want)
	}
}

func TestExecutorWithdrawsWhatHasNotBegun(t *testing.T) {
	e := newExecutor()
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
	e := newExecutor()
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
