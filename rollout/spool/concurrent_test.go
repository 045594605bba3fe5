package spool

import (
	"fmt"
	"sync"
	"testing"
	"time"
)

func TestConcurrentAppendsShareSyncs(t *testing.T) {
	// Of short segments the end is synced too, as often as chance has it.
	t.Run("short segments", func(t *testing.T) { concurrentAppends(t, 2000) })
	t.Run("one segment", func(t *testing.T) {
		if syncs, appends := concurrentAppends(t, 1<<20); syncs >= appends {
			t.Fatalf("%d syncs for %d appends", syncs, appends)
		}
	})
}

func concurrentAppends(t *testing.T, segmentBytes int64) (syncs, appends int) {
	d := newMemDisk()
	l, err := openOn(d, segmentBytes)
	if err != nil {
		t.Fatal(err)
	}
	d.syncs = 0
	const workers, each = 8, 25
	// The first sync waits until half of the workers' records wait behind it; it cannot where most are in it.
	var once sync.Once
	d.fail = func(op string) error {
		if op == "sync" {
			once.Do(func() {
				for range 200 {
					l.mu.RLock()
					n := len(l.waiting)
					l.mu.RUnlock()
					if n >= workers/2 {
						return
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
		return nil
	}
	var mu sync.Mutex
	got := map[uint64]string{}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			last := uint64(0)
			for i := range each {
				key := fmt.Sprint(w, "/", i)
				seq, err := l.Append(Record{Key: key, Body: make([]byte, 10)})
				if err != nil || seq <= last {
					t.Errorf("%s: %d after %d, %v", key, seq, last, err)
				}
				last = seq
				mu.Lock()
				got[seq] = key
				mu.Unlock()
				if i%10 == 0 {
					if err := l.Read(max(1, seq-3), func(Record) error { return nil }); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	next := uint64(1)
	err = l.Read(1, func(r Record) error {
		if r.Seq != next || got[r.Seq] != r.Key {
			return fmt.Errorf("record %d is %d %q, want %q", next, r.Seq, r.Key, got[next])
		}
		next++
		return nil
	})
	if err != nil || next != workers*each+1 {
		t.Fatal(err, next)
	}
	return d.syncs, workers * each
}
