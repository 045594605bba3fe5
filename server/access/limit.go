package access

import (
	"sync"
	"time"
)

// rates are token buckets (the other kind of token) by name. A bucket fills at
// rate a second up to burst; a request takes one.
type rates struct {
	rate, burst float64 // rate 0: no limit

	mu      sync.Mutex
	buckets map[string]bucket
}

type bucket struct {
	level float64
	at    time.Time // when level was true
}

// maxBuckets bounds the memory for names that strangers choose, such as addresses.
const maxBuckets = 1 << 16

func newRates(rate, burst float64) *rates {
	return &rates{rate: rate, burst: max(burst, 1), buckets: map[string]bucket{}}
}

// take takes one from a bucket. A refusal says when one will be there.
func (r *rates) take(name string, now time.Time) (wait time.Duration, ok bool) {
	if r.rate <= 0 {
		return 0, true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	b, known := r.buckets[name]
	if !known {
		if len(r.buckets) >= maxBuckets {
			r.drop(now)
		}
		b = bucket{level: r.burst, at: now}
	}
	if d := now.Sub(b.at); d > 0 {
		b.level, b.at = min(r.burst, b.level+d.Seconds()*r.rate), now
	}
	if ok = b.level >= 1; ok {
		b.level--
	} else {
		wait = time.Duration((1 - b.level) / r.rate * float64(time.Second))
	}
	r.buckets[name] = b
	return wait, ok
}

// drop forgets the buckets that are full again, which changes nothing, and all
// of them if none is: a flood of names must not take memory. Called with mu held.
func (r *rates) drop(now time.Time) {
	for name, b := range r.buckets {
		if b.level+now.Sub(b.at).Seconds()*r.rate >= r.burst {
			delete(r.buckets, name)
		}
	}
	if len(r.buckets) >= maxBuckets {
		clear(r.buckets)
	}
}
