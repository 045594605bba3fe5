package server

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// TestReadAll reads bodies of many lengths whose declared length is right, short
// or missing, into no memory and into memory of other bodies.
func TestReadAll(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	data := make([]byte, 3*firstBuffer+5)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	for _, n := range []int{0, 1, 511, 4096, firstBuffer - 1, firstBuffer, firstBuffer + 1, 2*firstBuffer + 1, len(data)} {
		for _, declared := range []int64{-1, 0, int64(n), int64(n / 2), 1 << 40} {
			for _, into := range [][]byte{nil, make([]byte, 10), make([]byte, 1, n+1), make([]byte, n)} {
				got, err := readAll(into, bytes.NewReader(data[:n]), declared)
				if err != nil || !bytes.Equal(got, data[:n]) {
					t.Fatalf("%d bytes, %d declared: read %d, %v", n, declared, len(got), err)
				}
				if most := max(2*n, firstBuffer, cap(into)) + 8<<10; cap(got) > most {
					t.Errorf("%d bytes, %d declared: %d allocated, expected at most %d", n, declared, cap(got), most)
				}
			}
		}
	}
	if _, err := readAll(nil, io.MultiReader(bytes.NewReader(data[:9]), iotest.ErrReader(io.ErrClosedPipe)), 20); err != io.ErrClosedPipe {
		t.Errorf("a body that breaks off: %v", err)
	}
	if got, err := readAll(nil, iotest.OneByteReader(bytes.NewReader(data[:5000])), -1); err != nil || !bytes.Equal(got, data[:5000]) {
		t.Errorf("byte by byte: %d, %v", len(got), err)
	}
}

// TestBodiesAreUsedAgain: memory comes back for the next body, but not when it is
// much larger than what was in it.
func TestBodiesAreUsedAgain(t *testing.T) {
	var p bodies
	for range 100 { // under the race detector a pool forgets at random
		p.give(make([]byte, 1000, 1500))
	}
	found := false
	for range 100 {
		found = found || cap(p.take()) == 1500
	}
	if !found {
		t.Error("memory of 1500 bytes never came back")
	}
	var q bodies
	q.give(make([]byte, 10, 1<<20))
	if b := q.take(); b != nil {
		t.Errorf("%d bytes are kept for a body of 10", cap(b))
	}
}
