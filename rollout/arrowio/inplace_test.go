package arrowio

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"trainerd/rollout"
)

// bothWays decodes a copy of data in place, holds it to DecodeBytes, and says
// whether it was kept. Memory that was not kept is overwritten before it looks.
func bothWays(t *testing.T, data []byte, l rollout.Limits) (kept bool) {
	t.Helper()
	want, wantErr := DecodeBytes(data, testSchema, l)
	own := slices.Clip(slices.Clone(data))
	got, kept, err := DecodeInPlace(own, testSchema, l)
	if fmt.Sprint(err) != fmt.Sprint(wantErr) || kept && err != nil {
		t.Fatalf("in place (kept: %v): %v, expected %v", kept, err, wantErr)
	}
	if err != nil {
		return false
	}
	if !kept {
		for i := range own {
			own[i] ^= 0xA5
		}
	}
	want.Shared = kept
	if diff := cmp.Diff(want, got, unread); diff != "" {
		t.Fatalf("kept %v: %s", kept, diff)
	}
	// Growing one row's values must not reach the next one's.
	for i := range got.Rollouts {
		r := &got.Rollouts[i]
		if kept && (cap(r.Completion) > len(r.Completion) || cap(r.SamplerLogProbs) > len(r.SamplerLogProbs)) {
			t.Fatalf("row %d can grow", i)
		}
	}
	return kept
}

// In place is as by copy, whatever the batch and the codec.
func TestInPlaceIsAsByCopy(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	limits := testLimits
	limits.MaxCompletionTokens, limits.MaxTokens, limits.MaxBytes = 1<<16, 1<<20, 1<<24
	times := 0
	for i := range 60 {
		b := randomBatch(r, 1+r.IntN(20), 30)
		if i%2 == 0 { // without masks, and beside 16 kB a row the schema is nothing: worth keeping
			for k := range b.Rollouts {
				x := &b.Rollouts[k]
				x.LossMask, x.Completion, x.SamplerLogProbs = nil, make([]int32, 2000), make([]float32, 2000)
				for n := range x.Completion {
					x.Completion[n], x.SamplerLogProbs[n] = r.Int32N(1000), -r.Float32()
				}
			}
		}
		codec := []string{"", "", "lz4", "zstd"}[r.IntN(4)]
		var buf bytes.Buffer
		if err := Encode(&buf, b, codec); err != nil {
			t.Fatal(err)
		}
		kept := bothWays(t, buf.Bytes(), limits)
		if kept != (i%2 == 0 && codec == "") {
			t.Fatalf("batch %d, codec %q: kept %v", i, codec, kept)
		}
		if kept {
			times++
		}
		// A wrong value is the same fault.
		if data := buf.Bytes(); codec == "" {
			at := len(data) / 2 &^ 3
			copy(data[at:], []byte{0xFF, 0xFF, 0xFF, 0x7F})
			bothWays(t, data, limits)
		}
		// Data that is not aligned is copied.
		shifted := append([]byte{0}, buf.Bytes()...)[1:]
		if _, kept, err := DecodeInPlace(shifted, testSchema, limits); kept && uintptr(unsafe.Pointer(&shifted[0]))%4 != 0 {
			t.Fatal("kept unaligned data", err)
		}
	}
	if times == 0 {
		t.Fatal("nothing was kept")
	}
}

// What a batch keeps is at most a third more than what it uses.
func TestInPlaceKeepsLittleElse(t *testing.T) {
	limits := testLimits
	limits.MaxCompletionTokens, limits.MaxPromptTokens, limits.MaxTokens, limits.MaxBytes = 1<<16, 1<<16, 1<<20, 1<<24
	for _, c := range []struct {
		name       string
		completion int
		spare      int // capacity of the body beyond its length
		kept       bool
	}{
		{"mostly completion", 40000, 0, true},
		{"much prompt", 4000, 0, false},
		{"much spare memory", 40000, 80000, false},
	} {
		b := &rollout.Batch{HasReward: true}
		for range 2 {
			b.Rollouts = append(b.Rollouts, rollout.Rollout{GroupID: "g", Prompt: make([]int32, 2000), Completion: make([]int32, c.completion), PolicyStep: rollout.NoPolicyStep})
		}
		var buf bytes.Buffer
		if err := Encode(&buf, b, ""); err != nil {
			t.Fatal(err)
		}
		data := append(make([]byte, 0, buf.Len()+c.spare*4), buf.Bytes()...)
		schema := testSchema
		schema.RewardWeights, schema.SamplerLogProbs = nil, false
		got, kept, err := DecodeInPlace(data, schema, limits)
		if err != nil {
			t.Fatal(err)
		}
		used := 4 * int64(2*c.completion)
		if kept != c.kept || kept && 4*used < 3*int64(cap(data)) {
			t.Errorf("%s: kept %v, %d bytes used of %d", c.name, kept, used, cap(data))
		}
		clear(data)
		if len(got.Rollouts) != 2 {
			t.Errorf("%s: %d rows", c.name, len(got.Rollouts))
		}
	}
}
