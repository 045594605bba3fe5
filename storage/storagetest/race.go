package storagetest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"trainerd/storage"
)

// parallel calls f(0) to f(n-1) on a few goroutines and fails with the first error.
func parallel(t *testing.T, workers, n int, f func(i int) error) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(workers)
	for i := range n {
		g.Go(func() error { return f(i) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// handles are two independent openings of one store.
func handles(t *testing.T, c Config) []storage.Blob {
	b := c.Open(t)
	return []storage.Blob{b, c.Again(t, b)}
}

// testOverwrite reads while writers replace: every read is one whole object.
func testOverwrite(t *testing.T, c Config) {
	hs := handles(t, c)
	// Object i is a run of words i whose length also follows from i.
	object := func(i uint32) []byte {
		data := make([]byte, 4*(50_000+1000*int(i)))
		for at := 0; at < len(data); at += 4 {
			binary.LittleEndian.PutUint32(data[at:], i)
		}
		return data
	}
	put(t, hs[0], "k", object(0))
	var stop atomic.Bool
	var writers, readers sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			for i := range uint32(10) {
				data := object(2*i + uint32(w))
				if _, err := hs[w].Put(t.Context(), "k", stream{bytes.NewReader(data)}, -1, storage.Condition{}); err != nil {
					t.Errorf("put: %v", err)
				}
			}
		})
	}
	etags := [2]map[string]uint32{{}, {}}
	for n := range 2 {
		readers.Go(func() {
			for reads := 0; reads < 3 || !stop.Load(); reads++ {
				r, info, err := hs[n].Get(t.Context(), "k", 0, -1)
				if err != nil {
					t.Errorf("get: %v", err)
					return
				}
				got, err := io.ReadAll(r)
				r.Close()
				if err != nil || len(got) < 4 {
					t.Errorf("read: %d bytes, %v", len(got), err)
					return
				}
				i := binary.LittleEndian.Uint32(got)
				if !bytes.Equal(got, object(i)) || info.Size != int64(len(got)) {
					t.Errorf("read a torn object: %d bytes that begin as version %d, info says %d", len(got), i, info.Size)
					return
				}
				if was, ok := etags[n][info.ETag]; ok && was != i {
					t.Errorf("ETag %s is of versions %d and %d", info.ETag, was, i)
				}
				etags[n][info.ETag] = i
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	readers.Wait()
}

func testRaceIfAbsent(t *testing.T, c Config) {
	hs := handles(t, c)
	const rounds, writers = 10, 8
	for round := range rounds {
		key := fmt.Sprintf("race/%d", round)
		var won atomic.Int32
		var winner atomic.Int32
		var start, all sync.WaitGroup
		start.Add(1)
		for w := range writers {
			all.Go(func() {
				start.Wait()
				data := []byte{byte(w)}
				_, err := hs[w%len(hs)].Put(t.Context(), key, bytes.NewReader(data), 1, storage.Condition{IfAbsent: true})
				switch {
				case err == nil:
					won.Add(1)
					winner.Store(int32(w))
				case !errors.Is(err, storage.ErrPrecondition):
					t.Errorf("put: %v", err)
				}
			})
		}
		start.Done()
		all.Wait()
		if won.Load() != 1 {
			t.Fatalf("round %d: %d writers created the object, expected 1", round, won.Load())
		}
		if got, _ := get(t, hs[0], key); got[0] != byte(winner.Load()) {
			t.Errorf("round %d: object is of writer %d, %d won", round, got[0], winner.Load())
		}
	}
	// Multipart uploads decide at their end: both have all their parts there.
	large := noise(9, 16<<20+5)
	var won atomic.Int32
	parallel(t, 2, 2, func(i int) error {
		_, err := hs[i].Put(t.Context(), "race/large", bytes.NewReader(large), -1, storage.Condition{IfAbsent: true})
		if err == nil {
			won.Add(1)
		} else if !errors.Is(err, storage.ErrPrecondition) {
			return err
		}
		return nil
	})
	if won.Load() != 1 {
		t.Errorf("%d large writers created the object, expected 1", won.Load())
	}
}

// testRaceIfMatch counts with compare-and-swap: every success is one increment,
// and none is lost.
func testRaceIfMatch(t *testing.T, c Config) {
	hs := handles(t, c)
	const writers, increments = 4, 8
	put(t, hs[0], "n", make([]byte, 8))
	var swaps atomic.Int32
	parallel(t, writers, writers, func(w int) error {
		b := hs[w%len(hs)]
		for done := 0; done < increments; {
			r, info, err := b.Get(t.Context(), "n", 0, -1)
			if err != nil {
				return err
			}
			data, err := io.ReadAll(r)
			r.Close()
			if err != nil {
				return err
			}
			next := binary.LittleEndian.AppendUint64(nil, binary.LittleEndian.Uint64(data)+1)
			_, err = b.Put(t.Context(), "n", bytes.NewReader(next), 8, storage.Condition{IfMatch: info.ETag})
			if err == nil {
				done++
				swaps.Add(1)
			} else if !errors.Is(err, storage.ErrPrecondition) {
				return err
			}
		}
		return nil
	})
	data, _ := get(t, hs[0], "n")
	if got := binary.LittleEndian.Uint64(data); got != uint64(swaps.Load()) || got != writers*increments {
		t.Errorf("counter is %d after %d swaps, expected %d", got, swaps.Load(), writers*increments)
	}
}
