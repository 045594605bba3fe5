package trainer

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"trainerd/kernels"
	"trainerd/kernels/hostmem"
)

func plenty() int64 { return 1 << 40 }

// TestCaptureMemoryIsKept follows one job's memory through captures of changing
// sizes, its model's departure and the job's end.
func TestCaptureMemoryIsKept(t *testing.T) {
	const large = hostmem.Large
	b := captureBudget{limit: 4 * large}
	take := func(n int64) []byte {
		t.Helper()
		raw, why := b.take("a", n, plenty)
		if why != "" || int64(len(raw)) != n || cap(raw) != len(raw) {
			t.Fatalf("%d bytes of %d, %q", len(raw), n, why)
		}
		return raw
	}
	first := take(2 * large)
	first[0], first[large] = 1, 2
	if _, why := b.take("a", 1, plenty); !strings.Contains(why, "still being written") {
		t.Errorf("memory that is being written was given out again: %q", why)
	}
	b.give("a")
	if b.used != 2*large {
		t.Errorf("%d bytes kept", b.used)
	}
	if again := take(large); &again[0] != &first[0] {
		t.Error("a smaller capture does not use the memory that is there")
	}
	b.give("a")
	if whole := take(2 * large); &whole[0] != &first[0] || whole[large] != 2 {
		t.Error("the span has become smaller")
	}
	b.give("a")
	if more := take(3 * large); more[0] != 0 || b.used != 3*large {
		t.Errorf("%d bytes in use after growth", b.used)
	}
	b.drop("a") // its model leaves the device while the write is under way
	if b.used != 3*large || b.spans["a"] == nil {
		t.Error("memory was taken from a publication")
	}
	b.give("a")
	if b.used != 0 || len(b.spans) != 0 {
		t.Errorf("%d bytes are left of a job that is gone", b.used)
	}
	take(large)
	b.drop("a")
	b.give("a")
	take(large) // a job whose model is back keeps its memory again
	b.give("a")
	if b.used != large {
		t.Errorf("%d bytes kept", b.used)
	}
	defer func() {
		if recover() == nil {
			t.Error("memory was given back twice without a panic")
		}
	}()
	b.give("a")
}

// TestCaptureMemoryGivesWay holds what happens to idle memory when another job
// needs room under the limit, or the host has none, or nobody can be asked.
func TestCaptureMemoryGivesWay(t *testing.T) {
	b := captureBudget{limit: 100}
	idle := func(id JobID, n int64) {
		t.Helper()
		if _, why := b.take(id, n, plenty); why != "" {
			t.Fatal(why)
		}
		b.give(id)
	}
	idle("a", 60)
	idle("b", 40)
	if _, why := b.take("c", 50, plenty); why != "" {
		t.Errorf("idle memory does not give way: %s", why)
	}
	if b.used > 100 {
		t.Errorf("%d bytes in use of 100", b.used)
	}
	if _, why := b.take("d", 60, plenty); !strings.Contains(why, "max_capture_bytes") {
		t.Errorf("a capture over the limit: %q", why)
	}
	b.give("c")
	b.dropIdle()
	idle("a", 60)
	host := func() int64 { return 70 - b.used } // what the host has besides
	if _, why := b.take("b", 30, host); why != "" || b.spans["a"] != nil {
		t.Errorf("idle memory is not given back to a host that has none: %q", why)
	}
	if _, why := b.take("c", 50, host); !strings.Contains(why, "the host has 40 free") {
		t.Errorf("a capture larger than the host has: %q", why)
	}
	if b.give("b"); !b.dropIdle() || b.dropIdle() || b.used != 0 {
		t.Errorf("%d bytes left", b.used)
	}
	b.limit = 1 << 62
	if _, why := b.take("a", 1<<50, func() int64 { return 1 << 61 }); !strings.Contains(why, "cannot allocate") || b.used != 0 {
		t.Errorf("a petabyte, which the host says it has: %q, %d bytes in use", why, b.used)
	}
}

// TestCaptureMemoryBelongsToOne lets publications of several jobs, departures
// and pressure race: what a publication has is written by nobody else, and the
// count stays within the limit.
func TestCaptureMemoryBelongsToOne(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	b := captureBudget{limit: 3000}
	var jobs, others sync.WaitGroup
	stop := make(chan struct{})
	for k := range 4 {
		id := JobID(fmt.Sprint("job", k))
		jobs.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(k)))
			for range 300 {
				raw, why := b.take(id, int64(1+rng.IntN(1000)), plenty)
				if why != "" {
					continue
				}
				for i := range raw {
					raw[i] = byte(k)
				}
				for i := range raw {
					if raw[i] != byte(k) {
						t.Errorf("%s: byte %d is of job %d", id, i, raw[i])
						break
					}
				}
				b.give(id)
			}
		})
	}
	others.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 99))
		for {
			select {
			case <-stop:
				return
			default:
			}
			b.drop(JobID(fmt.Sprint("job", rng.IntN(4))))
			b.mu.Lock()
			sum := int64(0)
			for _, s := range b.spans {
				sum += s.bytes()
			}
			if sum != b.used || b.used > b.limit {
				t.Errorf("%d bytes are counted, %d taken, %d allowed", b.used, sum, b.limit)
			}
			b.mu.Unlock()
			if rng.IntN(10) == 0 {
				b.dropIdle()
			}
		}
	})
	jobs.Wait()
	close(stop)
	others.Wait()
	b.dropIdle()
	if b.used != 0 || len(b.spans) != 0 {
		t.Errorf("%d bytes of %d spans are left", b.used, len(b.spans))
	}
}

// pinning is a device that keeps account of the host memory it knows. Closed, it forgets all.
type pinning struct {
	kernels.Device
	t      *testing.T
	known  map[*byte]int
	asked  int
	refuse error
}

func (p *pinning) Pin(host []byte) (func(), error) {
	p.asked++
	if p.refuse != nil {
		return nil, p.refuse
	}
	first := &host[0]
	if p.known[first] != 0 {
		p.t.Error("memory is pinned twice")
	}
	p.known[first] = len(host)
	return func() {
		if p.known[first] != len(host) || host[len(host)-1] > 1 { // which reads what must still be there
			p.t.Error("memory is unpinned twice, or with another length")
		}
		delete(p.known, first)
	}, nil
}

// TestCaptureMemoryIsPinned: memory is known to the device from its first capture
// until it is given back, once, and to a device that is opened anew again.
func TestCaptureMemoryIsPinned(t *testing.T) {
	const large = hostmem.Large
	first, second := &pinning{t: t, known: map[*byte]int{}}, &pinning{t: t, known: map[*byte]int{}}
	b := captureBudget{limit: 8 * large}
	capture := func(id JobID, n int64, dev kernels.Device) (raw []byte, err error) {
		t.Helper()
		raw, why := b.take(id, n, plenty)
		if why != "" {
			t.Fatal(why)
		}
		err = b.pin(id, dev)
		b.give(id)
		return raw, err
	}
	want := func(dev *pinning, asked int, spans ...int) {
		t.Helper()
		all := 0
		for _, n := range spans {
			all += n
		}
		sum := 0
		for _, n := range dev.known {
			sum += n
		}
		if dev.asked != asked || len(dev.known) != len(spans) || sum != all {
			t.Errorf("asked %d times and knows %v, expected %d times and %v", dev.asked, dev.known, asked, spans)
		}
	}
	for _, n := range []int64{2 * large, large, 2 * large} { // one span
		if _, err := capture("a", n, first); err != nil {
			t.Fatal(err)
		}
	}
	want(first, 1, 2*large)
	capture("b", large, first)
	capture("small", 4096, first) // of the Go heap
	want(first, 2, 2*large, large)
	capture("a", 3*large, first) // another span
	want(first, 3, 3*large, large)
	b.drop("b")
	want(first, 3, 3*large)

	// The device is lost: memory that it knew goes to the next one.
	capture("a", large, second)
	want(first, 3)
	want(second, 1, 3*large)
	b.drop("a")
	want(second, 1)

	// A device that refuses is asked once for each span, and captures go on.
	second.refuse = errors.New("no more pages")
	if _, err := capture("a", large, second); !errors.Is(err, second.refuse) {
		t.Errorf("the refusal ends in %v", err)
	}
	if raw, err := capture("a", large, second); err != nil || len(raw) != large {
		t.Errorf("after a refusal: %v", err)
	}
	want(second, 2)
	b.drop("a")
	for b.dropIdle() {
	}
	if b.used != 0 || len(first.known)+len(second.known) != 0 {
		t.Errorf("%d bytes in use, pinned %v and %v", b.used, first.known, second.known)
	}
	// A device that cannot pin is not asked.
	if _, err := capture("c", large, struct{ kernels.Device }{}); err != nil {
		t.Error(err)
	}
}
