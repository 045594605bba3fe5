package storage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

// TestConduit sends random bytes in writes of random sizes to a reader that
// takes them by Read, by WriteTo, and by one after the other: they arrive, once
// and in order, with their digest.
func TestConduit(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		want := make([]byte, rng.IntN(3*conduitChunk))
		for i := range want {
			want[i] = byte(rng.Uint32())
		}
		c := newConduit()
		go func() {
			rng := rand.New(rand.NewPCG(seed, 2))
			for data := want; len(data) > 0; {
				n := min(rng.IntN(1<<(rng.IntN(21)+1)), len(data))
				if k, err := c.Write(data[:n]); k != n || err != nil {
					t.Errorf("seed %d: wrote %d of %d, %v", seed, k, n, err)
				}
				data = data[n:]
			}
			c.end(nil)
		}()
		var got bytes.Buffer
		src := Source(t.Context(), c, int64(len(want)))
		by := rng.IntN(3)
		for reads := rng.IntN(20); by == 2 && reads > 0 || by == 0; reads-- {
			p := make([]byte, rng.IntN(conduitChunk))
			n, err := src.Read(p)
			got.Write(p[:n])
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		if by > 0 {
			if _, err := src.(Digested).WriteTo(&got); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		c.leave()
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("seed %d: %d bytes arrived, expected %d", seed, got.Len(), len(want))
		}
		if sum := sha256.Sum256(want); src.(Digested).Digest() != hex.EncodeToString(sum[:]) {
			t.Errorf("seed %d: another digest", seed)
		}
	}
}

// failing is a writer that takes some bytes.
type failing struct{ left int }

var errFull = errors.New("no space left")

func (f *failing) Write(p []byte) (int, error) {
	n := min(len(p), f.left)
	if f.left -= n; n < len(p) {
		return n, errFull
	}
	return n, nil
}

// TestConduitEnds holds what each side hears of the other's failure.
func TestConduitEnds(t *testing.T) {
	cause := errors.New("cause")
	for _, tc := range []struct {
		name         string
		end          error // the writer's, after some chunks
		room         int   // the reader's
		size         int64
		wrote, heard error
	}{
		{"whole", nil, 1 << 30, -1, nil, nil},
		{"writer fails", cause, 1 << 30, -1, nil, cause},
		{"writer ends as if whole", &callbackError{io.EOF}, 1 << 30, -1, nil, &callbackError{io.EOF}},
		{"reader is full", nil, conduitChunk + 5, -1, errPutEnded, errFull},
		{"more than was said", nil, 1 << 30, conduitChunk, errPutEnded, errSize},
		{"less than was said", nil, 1 << 30, 9 * conduitChunk, nil, errSize},
	} {
		c := newConduit()
		wrote := make(chan error, 1)
		go func() {
			_, err := c.Write(make([]byte, 3*conduitChunk+1))
			c.end(tc.end)
			wrote <- err
		}()
		n, err := Source(t.Context(), c, tc.size).(Digested).WriteTo(&failing{tc.room})
		c.leave()
		switch {
		case tc.heard == errSize && (err == nil || n > tc.size), tc.heard != errSize && !errors.Is(err, tc.heard) && !(err != nil && tc.heard != nil && err.Error() == tc.heard.Error()):
			t.Errorf("%s: the reader took %d bytes and heard %v, expected %v", tc.name, n, err, tc.heard)
		case tc.name == "writer ends as if whole" && errors.Is(err, io.EOF):
			t.Errorf("%s: the end of the file came through", tc.name)
		}
		if err := <-wrote; !errors.Is(err, tc.wrote) {
			t.Errorf("%s: the writer heard %v, expected %v", tc.name, err, tc.wrote)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	c := newConduit()
	go func() { c.Write(make([]byte, 10)); c.end(nil) }()
	cancel()
	if _, err := Source(ctx, c, -1).(Digested).WriteTo(io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled source: %v", err)
	}
	c.leave()
}

// errSize stands for a fault of the size.
var errSize = errors.New("size")
