package arrowio

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/apache/arrow/go/v17/arrow"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

// mustFault checks that an error is a fault of the client's making, found by a
// check and not by a panic.
func mustFault(t *testing.T, err error) {
	t.Helper()
	f, ok := fault.As(err)
	if !ok || f.Kind != fault.Malformed && f.Kind != fault.Invalid && f.Kind != fault.TooLarge || f.Code == codePanic {
		t.Fatalf("not a fault of the input: %v", err)
	}
}

// whole checks what any accepted batch must satisfy.
func whole(t *testing.T, b *rollout.Batch, l rollout.Limits) {
	t.Helper()
	if len(b.Rollouts) == 0 || len(b.Rollouts) > l.MaxRows || b.Tokens() > l.MaxTokens {
		t.Fatalf("%d rows, %d tokens passed the limits", len(b.Rollouts), b.Tokens())
	}
	for i := range b.Rollouts {
		r := &b.Rollouts[i]
		n := len(r.Completion)
		if r.GroupID == "" || n == 0 || len(r.Prompt) == 0 || math.IsNaN(r.Reward) || math.IsInf(r.Reward, 0) || r.PolicyStep < rollout.NoPolicyStep ||
			r.LossMask != nil && len(r.LossMask) != n || r.SamplerLogProbs != nil && len(r.SamplerLogProbs) != n || r.LossWeights != nil && len(r.LossWeights) != n {
			t.Fatalf("row %d passed: %+v", i, r)
		}
		for _, v := range slices.Concat(r.Prompt, r.Completion) {
			if v < 0 || int(v) >= l.Vocab {
				t.Fatalf("row %d has token %d", i, v)
			}
		}
		for k, v := range r.SamplerLogProbs {
			if !(v <= maxLogProb) || math.IsInf(float64(v), 0) {
				t.Fatalf("row %d has log-prob %v at %d", i, v, k)
			}
		}
	}
}

// allocated runs f and returns the bytes it allocated.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// A stream cut anywhere is a fault, from a reader as from memory.
func TestTruncatedStreams(t *testing.T) {
	for _, name := range []string{"plain", "batches", "zstd", "dictionary_delta"} {
		data := golden(t, name)
		for n := range data {
			_, err := DecodeBytes(data[:n], testSchema, testLimits)
			mustFault(t, err)
			if n%7 == 0 {
				_, other := Decode(bytes.NewReader(data[:n]), testSchema, testLimits)
				if fmt.Sprint(other) != fmt.Sprint(err) {
					t.Fatalf("cut at %d: %v from a reader, %v from memory", n, other, err)
				}
			}
		}
		_, err := DecodeBytes(append(slices.Clone(data), 0), testSchema, testLimits)
		mustFault(t, err)
	}
}

// A flipped bit is a fault or another valid batch (a token became another
// token), and costs no more memory than an honest stream may.
func TestFlippedBits(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	// lz4's reader takes up to two blocks of 4 MiB from its pool; the rest of a
	// batch of 4 KiB under limits of 1 MiB is the decompressed data, once.
	const most = 12 << 20
	for _, name := range goldens {
		data := golden(t, name)
		var worst uint64
		accepted := 0
		for range 1200 {
			flipped := slices.Clone(data)
			for range 1 + r.IntN(3) {
				at := r.IntN(len(flipped))
				if r.IntN(2) == 0 {
					flipped[at] ^= 1 << r.IntN(8)
				} else {
					flipped[at] = []byte{0, 0xff, 0x7f, 0x80}[r.IntN(4)]
				}
			}
			n := allocated(func() {
				b, err := DecodeBytes(flipped, testSchema, testLimits)
				if err != nil {
					mustFault(t, err)
					return
				}
				accepted++
				whole(t, b, testLimits)
			})
			worst = max(worst, n)
		}
		if worst > most {
			t.Fatalf("%s: a flipped stream of %d bytes made the decoder allocate %d", name, len(data), worst)
		}
		t.Logf("%s: %d bytes, %d of 1200 still valid, worst allocation %d KiB", name, len(data), accepted, worst>>10)
	}
}

// wideStream is one row with a long completion, which compresses to almost nothing.
func wideStream(t testing.TB, tokens int, codec string) []byte {
	t.Helper()
	var buf bytes.Buffer
	b := &rollout.Batch{HasReward: true, Rollouts: []rollout.Rollout{{GroupID: "g", Prompt: []int32{1}, Completion: make([]int32, tokens), PolicyStep: rollout.NoPolicyStep}}}
	if err := Encode(&buf, b, codec); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// A decompression bomb is refused before it is inflated.
func TestDecompressionBombs(t *testing.T) {
	for _, codec := range []string{"lz4", "zstd"} {
		data := wideStream(t, 8<<20, codec) // 32 MiB
		if len(data) > 1<<20 {
			t.Fatalf("%d bytes are no bomb", len(data))
		}
		limits := testLimits
		n := allocated(func() {
			_, err := DecodeBytes(data, testSchema, limits)
			if fault.KindOf(err) != fault.TooLarge {
				t.Errorf("%s: %v", codec, err)
			}
		})
		if n > 1<<20 {
			t.Errorf("%s: refusing it took %d bytes", codec, n)
		}
		// The buffer lies about its size: 4 KiB for 32 MiB.
		lie := slices.Clone(data)
		size := binary.LittleEndian.AppendUint64(nil, 32<<20)
		at := bytes.Index(lie, size)
		if at < 0 {
			t.Fatal("no length of 32 MiB in the stream")
		}
		for _, claim := range []uint64{4 << 10, 32<<20 - 4, 32<<20 + 4, 1 << 60, math.MaxUint64 - 1} {
			binary.LittleEndian.PutUint64(lie[at:], claim)
			limits.MaxBytes, limits.MaxTokens, limits.MaxCompletionTokens = 64<<20, 16<<20, 16<<20
			n := allocated(func() {
				_, err := DecodeBytes(lie, testSchema, limits)
				mustFault(t, err)
			})
			if limit := min(claim, 64<<20) + 16<<20; n > limit {
				t.Errorf("%s: a buffer that claims %d took %d bytes", codec, claim, n)
			}
		}
	}
	if _, err := DecodeBytes(wideStream(t, 50, "zstd"), testSchema, testLimits); err != nil {
		t.Fatal(err)
	}
}

// A compressed buffer holds what it says, no more and no less, and a claim that
// no compression could fulfil costs nothing.
func TestInflateHoldsTheClaim(t *testing.T) {
	want := bytes.Repeat([]byte("rollout "), 1000)
	var lz bytes.Buffer
	w := lz4.NewWriter(&lz)
	if _, err := w.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for codec, raw := range map[int][]byte{codecLZ4: lz.Bytes(), codecZSTD: enc.EncodeAll(want, nil)} {
		got, err := inflate(codec, raw, len(want))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatal(codec, err)
		}
		for _, claim := range []int{1, len(want) - 8, len(want) - 1, len(want) + 1, len(want) * 2} {
			_, err := inflate(codec, raw, claim)
			if err == nil {
				t.Errorf("codec %d: %d bytes passed for %d", codec, len(want), claim)
				continue
			}
			mustFault(t, err)
		}
		n := allocated(func() {
			_, err := inflate(codec, raw[:10], 64<<20)
			mustFault(t, err)
		})
		if n > 1<<20 {
			t.Errorf("codec %d: 10 bytes that claim 64 MiB took %d", codec, n)
		}
	}
}

// Lengths that nobody could mean are refused before anything is allocated for them.
func TestAbsurdLengths(t *testing.T) {
	prefix := func(n uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, continuation), n)
	}
	limits := testLimits
	limits.MaxBytes = 1 << 40
	plain := golden(t, "plain")
	for name, data := range map[string][]byte{
		"metadata of 2 GiB":      prefix(math.MaxInt32),
		"metadata of -1":         prefix(math.MaxUint32),
		"end before the schema":  prefix(0),
		"nothing":                {},
		"text":                   []byte("group_id,prompt_tokens\n"),
		"an Arrow file":          append([]byte("ARROW1\x00\x00"), plain...),
		"empty metadata":         append(prefix(8), make([]byte, 8)...),
		"the schema twice":       append(slices.Clone(plain[:8+int(binary.LittleEndian.Uint32(plain[4:]))]), plain...),
		"a continuation, then 0": append(slices.Clone(plain[:8+int(binary.LittleEndian.Uint32(plain[4:]))]), prefix(0)...),
	} {
		for _, source := range []func() (*rollout.Batch, error){
			func() (*rollout.Batch, error) { return DecodeBytes(data, testSchema, limits) },
			func() (*rollout.Batch, error) { return Decode(bytes.NewReader(data), testSchema, limits) },
		} {
			n := allocated(func() {
				_, err := source()
				mustFault(t, err)
			})
			if n > 3<<20 {
				t.Errorf("%s: %d bytes allocated", name, n)
			}
		}
	}
}

// A body that goes on for ever is cut off at the limit, and the reader's own
// fault is kept.
func TestBodyLimitOfAReader(t *testing.T) {
	endless := io.MultiReader(bytes.NewReader(wideStream(t, 1, "")[:8]), zeros{})
	_, err := Decode(endless, testSchema, testLimits)
	mustFault(t, err)
	limits := testLimits
	limits.MaxBytes = 100
	if _, err := Decode(bytes.NewReader(golden(t, "plain")), testSchema, limits); fault.KindOf(err) != fault.TooLarge {
		t.Fatal(err)
	}
	own := fault.New(fault.TooLarge, "http_body", "the body is too large")
	if _, err := Decode(failing{own}, testSchema, testLimits); err != error(own) {
		t.Fatal(err)
	}
	if _, err := Decode(failing{io.ErrClosedPipe}, testSchema, testLimits); fault.KindOf(err) != fault.Malformed {
		t.Fatal(err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// Names that a client makes up do not flood an error, and a schema of thousands
// of columns is refused.
func TestManyAndLongColumns(t *testing.T) {
	cols := []col{}
	for i := range maxColumns + 1 {
		cols = append(cols, col{fmt.Sprint("reward_", i), columnOf(t, arrow.PrimitiveTypes.Float32, `[1]`)})
	}
	if _, err := DecodeBytes(streamOf(t, nil, cols...), testSchema, testLimits); fault.KindOf(err) != fault.TooLarge {
		t.Fatal(err)
	}
	long := streamOf(t, nil, col{strings.Repeat("x", 5000), columnOf(t, arrow.PrimitiveTypes.Float32, `[1]`)})
	if _, err := DecodeBytes(long, testSchema, testLimits); fault.KindOf(err) != fault.Invalid || len(err.Error()) > 500 {
		t.Fatal(err)
	}
}

// Two readers of one stream agree, whatever the batch.
func TestRandomBatchesRoundTrip(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 150 {
		b := randomBatch(r, 1+r.IntN(20), 30)
		var buf bytes.Buffer
		if err := Encode(&buf, b, []string{"", "lz4", "zstd"}[r.IntN(3)]); err != nil {
			t.Fatal(err)
		}
		got, err := DecodeBytes(buf.Bytes(), testSchema, testLimits)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(b, got, unread); diff != "" {
			t.Fatal(diff)
		}
	}
}

func randomBatch(r *rand.Rand, rows, maxTokens int) *rollout.Batch {
	b := &rollout.Batch{Components: []string{"format", "penalty"}}
	tokens := func() []int32 {
		out := make([]int32, 1+r.IntN(maxTokens))
		for i := range out {
			out[i] = r.Int32N(1000)
		}
		return out
	}
	prompts := map[string][]int32{}
	logprobs := r.IntN(2) == 0
	for i := range rows {
		x := rollout.Rollout{GroupID: fmt.Sprint("group ", r.IntN(rows/3+1)), ID: fmt.Sprint("r", i), Completion: tokens(),
			Components: []float64{r.Float64(), r.NormFloat64()}, PolicyStep: int64(r.IntN(5)) - 1, Truncated: r.IntN(2) == 0}
		if prompts[x.GroupID] == nil {
			prompts[x.GroupID] = tokens()
		}
		x.Prompt = prompts[x.GroupID]
		x.Reward = x.Components[0] - x.Components[1]
		if r.IntN(2) == 0 {
			for range x.Completion {
				x.LossMask = append(x.LossMask, r.IntN(4) > 0)
			}
		}
		if logprobs {
			for k := range x.Completion {
				x.SamplerLogProbs = append(x.SamplerLogProbs, -r.Float32())
				if x.LossMask != nil && !x.LossMask[k] {
					x.SamplerLogProbs[k] = 0
				}
			}
		}
		b.Rollouts = append(b.Rollouts, x)
	}
	return b
}

// FuzzDecode: whatever comes in, a whole batch within limits or a fault comes out.
func FuzzDecode(f *testing.F) {
	for _, name := range append(goldens, "fixed_size") {
		f.Add(golden(f, name))
	}
	f.Add(wideStream(f, 90, "zstd"))
	f.Add(wideStream(f, 5, ""))
	limits := testLimits
	f.Fuzz(func(t *testing.T, data []byte) {
		bothWays(t, data, limits)
		b, err := DecodeBytes(data, testSchema, limits)
		if err != nil {
			mustFault(t, err)
			if _, other := Decode(bytes.NewReader(data), testSchema, limits); fmt.Sprint(other) != fmt.Sprint(err) {
				t.Fatalf("%v from memory, %v from a reader", err, other)
			}
		} else {
			whole(t, b, limits)
			var buf bytes.Buffer
			if err := Encode(&buf, b, ""); err != nil {
				t.Fatal(err)
			}
			again, err := DecodeBytes(buf.Bytes(), testSchema, rollout.Limits{MaxBytes: 1 << 30, MaxRows: limits.MaxRows, MaxTokens: limits.MaxTokens,
				MaxPromptTokens: limits.MaxPromptTokens, MaxCompletionTokens: limits.MaxCompletionTokens, Vocab: limits.Vocab})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(b, again, unread); diff != "" {
				t.Fatal(diff)
			}
		}
		if _, err := DecodeScores(bytes.NewReader(data), limits); err != nil {
			mustFault(t, err)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	batch := randomBatch(r, 64, 2000)
	for _, codec := range []string{"", "lz4", "zstd"} {
		var buf bytes.Buffer
		if err := Encode(&buf, batch, codec); err != nil {
			b.Fatal(err)
		}
		limits := rollout.Limits{MaxBytes: 1 << 30, MaxRows: 1 << 20, MaxTokens: 1 << 30, MaxPromptTokens: 1 << 20, MaxCompletionTokens: 1 << 20, Vocab: 1000}
		b.Run("codec="+codec, func(b *testing.B) {
			b.SetBytes(int64(buf.Len()))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := DecodeBytes(buf.Bytes(), testSchema, limits); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
