package trainer

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

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
