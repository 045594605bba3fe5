package kernels

import (
	"slices"

	"gorgonia.org/tensor"

	"trainerd/kernels/internal/seal"
)

// DType is the element type of a Buffer.
type DType uint8

const (
	F32 DType = iota
	BF16
	I32
	I16 // the low half of a float32 master weight, beside a BF16 buffer
	I8  // a code of a compact first moment, see AdamW
)

// Size returns the bytes of one element.
func (t DType) Size() int {
	return [...]int{F32: 4, BF16: 2, I32: 4, I16: 2, I8: 1}[t]
}

// String returns "f32", "bf16", "i32", "i16" or "i8".
func (t DType) String() string { return [...]string{"f32", "bf16", "i32", "i16", "i8"}[t] }

// Buffer is a span of device memory holding Len elements of one type. Slices
// alias their parent. A Buffer is valid until its Arena is released past it,
// or until Device.Free.
type Buffer interface {
	Type() DType
	Len() int
	// Slice returns elements [from, to), aliasing this buffer.
	Slice(from, to int) Buffer
	Sealed(seal.Token)
}

// Arena is a stack of scratch memory of fixed capacity. Alloc never zeroes.
type Arena interface {
	// Alloc takes n elements. It panics with *OutOfArena when the capacity is
	// exceeded, which a correct memory plan rules out.
	Alloc(t DType, n int) Buffer
	// Mark returns the current height, to be given to Release.
	Mark() int64
	// Release drops everything allocated since the mark.
	Release(mark int64)
	// Peak returns the greatest height seen, in bytes.
	Peak() int64
}

// Info describes a device.
type Info struct {
	Name      string // "cpu", "cuda:0"
	Model     string // processor or card, as it names itself
	Compute   DType  // type of weights and activations: F32 on the CPU, BF16 on CUDA
	GradType  DType  // type in which operations write parameter gradients
	Workers   int    // CPU workers or streaming multiprocessors
	MemTotal  int64  // bytes
	MemFree   int64  // bytes that a job may plan with, now
	Alignment int    // bytes to which every allocation is rounded up
}

// Device is one accelerator. It is used by one goroutine at a time. The
// interface is sealed: its implementations live below trainerd/kernels.
type Device interface {
	Info() Info

	// Alloc returns n uninitialised elements that live until Free. The purpose
	// ("weights", "gradients", "optimizer", "cache") is what a memory plan
	// files the bytes under. The error says how much was asked for and free.
	Alloc(purpose string, t DType, n int) (Buffer, error)
	Free(Buffer)
	// NewArena allocates scratch memory of a fixed capacity in bytes.
	NewArena(capacity int64) (Arena, error)
	FreeArena(Arena)

	// Upload copies a host tensor (float32, int32, int16 or int8, any shape) into
	// dst, rounding float32 to nearest even when dst is BF16. An int16 tensor may
	// also be the bits of BF16. Lengths must agree.
	Upload(dst Buffer, src *tensor.Dense)
	// Download waits for the operations before it and copies src to the host tensor.
	Download(dst *tensor.Dense, src Buffer) error
	// Layout uploads the segments of a micro-batch, once for all its layers.
	// Memory comes from the arena.
	Layout(a Arena, segments []Segment) Layout
	// Scatter uploads an index for ScatterAdd. Memory comes from the arena.
	Scatter(a Arena, s ScatterIndex) Scatter
	// Sync waits for all operations and returns the first error since the last Sync.
	Sync() error
	// Close frees the device. Buffers must not be used after it.
	Close() error

	Zero(dst Buffer)
	Copy(dst, src Buffer) // same length; converts between F32 and BF16
	// Lerp computes dst = (1-alpha)*dst + alpha*src, elementwise (reference sync).
	Lerp(dst, src Buffer, alpha float32)

	// Gather computes out[i,:] = table[rows[i],:]; rows is I32[n], width d.
	Gather(out, table, rows Buffer, d int)
	// ScatterAdd computes dst[s.Dst[u],:] (+)= sum of src[s.Src[i],:] over the u-th
	// bucket, in bucket order. With accumulate false the touched rows are overwritten
	// and all others are left alone.
	ScatterAdd(dst, src Buffer, s Scatter, d int, accumulate bool)

	Gemm(Gemm)
	// BiasBackward computes db[n] (+)= sum over rows of dy[M,n].
	BiasBackward(db, dy Buffer, m, n int, accumulate bool)

	RMSNorm(Norm)
	RMSNormBackward(NormBackward)
	Rope(Rope)
	RopeBackward(RopeBackward)
	Attention(Attention)
	AttentionBackward(AttentionBackward)
	// SwiGLU computes out[T,F] = silu(gu[:, :F]) * gu[:, F:].
	SwiGLU(out, gu Buffer, t, f int)
	// SwiGLUBackward writes dgu[T,2F] from dout[T,F] and gu[T,2F]; dgu may alias gu.
	SwiGLUBackward(dgu, dout, gu Buffer, t, f int)

	// LogProb is the LM head, forward only. See Head.
	LogProb(Head)
	// LogProbBackward is the LM head, forward and backward. See Head and HeadGrad.
	LogProbBackward(Head, HeadGrad)
	// Sample draws one token per row from the LM head. See Draw.
	Sample(Draw)

	// Advantages computes group-relative advantages in float64. See Advantages.
	Advantages(Advantages)

	// SumSquares adds the sum of squares of x, accumulated in float64 or by
	// compensated float32, to out[0] (F32[1]).
	SumSquares(out, x Buffer)
	// ClipCoef computes coef[0] = scale * min(1, maxNorm/(norm+1e-6)) with norm =
	// scale*sqrt(sumsq[0]); maxNorm 0 means no clipping. Not finite in, NaN out.
	ClipCoef(coef, sumsq Buffer, scale, maxNorm float32)
	// AdamW updates weights and moments. See AdamW.
	AdamW(AdamW)
	// AddGrad adds a micro-batch's gradients to those kept in BF16. See AddGrad.
	AddGrad(AddGrad)

	Sealed(seal.Token)
}

// HostAllocator is a device whose operations reach memory of the host over the bus.
type HostAllocator interface {
	// AllocHost is Alloc in page-locked host memory, none of it on the device. Any
	// operation may use the buffer, at the speed of the bus; Free frees it. A plan
	// counts its bytes under Host.
	AllocHost(purpose string, t DType, n int) (Buffer, error)
}

// Segment is a run of query rows that attend to one visible span and then
// causally to their own keys. It serves training (Q = K, KLen = QLen), prompt
// prefill and decoding (QLen = 1, keys in a cache).
//
// Query i of [0,QLen) sees every key row of [Prefix, Prefix+PrefixLen) and the
// own key rows K+j with j <= i + KLen - QLen.
type Segment struct {
	Q, QLen           int32 // rows of the query matrix
	K, KLen           int32 // rows of the key and value matrices
	Prefix, PrefixLen int32 // rows of the prefix key and value matrices; PrefixLen 0: none
}

// Layout is a device's copy of a micro-batch's segments with its schedule.
type Layout interface {
	Segments() []Segment
	Sealed(seal.Token)
}

// ScatterIndex lists, for each distinct destination row Dst[u], the source rows
// Src[Start[u]:Start[u+1]] that are summed into it, in that order.
type ScatterIndex struct {
	Dst, Start, Src []int32
}

// ScatterTo indexes source rows 0..len(rows)-1 by destination, destinations
// ascending and sources in order, so that a scattered sum has one order.
func ScatterTo(rows []int32) ScatterIndex {
	src := make([]int32, len(rows))
	for i := range src {
		src[i] = int32(i)
	}
	slices.SortStableFunc(src, func(a, b int32) int { return int(rows[a]) - int(rows[b]) })
	s := ScatterIndex{Src: src}
	for i, r := range src {
		if i == 0 || rows[r] != s.Dst[len(s.Dst)-1] {
			s.Dst, s.Start = append(s.Dst, rows[r]), append(s.Start, int32(i))
		}
	}
	s.Start = append(s.Start, int32(len(src)))
	return s
}

// Scatter is a device's copy of a ScatterIndex.
type Scatter interface {
	Sealed(seal.Token)
}

// Gemm is C[M,N] = op(A)·op(B) (+ C) (+ Bias). op(A) is [M,K]: A is stored
// [M,K], or [K,M] with TransA. op(B) is [K,N]: B is stored [K,N], or [N,K] with
// TransB. Products are accumulated in float32.
type Gemm struct {
	A, B, C        Buffer
	M, N, K        int
	TransA, TransB bool
	Accumulate     bool   // add to C instead of overwriting it
	Bias           Buffer // [N], added to every row; nil for none
}

// Norm is RMSNorm over rows of width D (Zhang & Sennrich 2019, arXiv 1910.07467):
// out = x * rstd * w, rstd = 1/sqrt(mean(x²)+eps). With Add, x = X + Add is
// formed first and written to Sum: the residual addition in one pass.
type Norm struct {
	Out  Buffer // [T,D]
	Rstd Buffer // F32[T]; nil when no backward pass follows
	X    Buffer // [T,D]
	Add  Buffer // [T,D] or nil
	Sum  Buffer // [T,D], may alias X; required with Add
	W    Buffer // [D]
	T, D int
	Eps  float32
}

// NormBackward is the gradient of Norm with respect to x (= Sum) and w.
type NormBackward struct {
	DX         Buffer // [T,D]; += with AddTo, else =
	DW         Buffer // [D]; += with Accumulate, else =
	DY, X, W   Buffer
	Rstd       Buffer
	T, D       int
	AddTo      bool
	Accumulate bool
}

// Rope applies rotary position embedding (rotate-half convention of Hugging
// Face: pairs (i, i+hd/2), angle pos*theta^(-2i/hd)) to the q and k parts of
// packed rows q|k|v, after an RMSNorm of each head when QW and KW are given
// (Qwen3). Out may alias In when there is no norm. v is copied if they differ.
type Rope struct {
	Out, In   Buffer // [T,W]
	Pos       Buffer // I32[T]
	T         int
	H, KV, HD int
	Theta     float64
	QW, KW    Buffer // [hd] each, or nil
	Rstd      Buffer // F32[T,H+KV], written when QW is given; nil when no backward follows
	Eps       float32
}

// RopeBackward turns the gradient of Rope's output into that of its input, in place.
type RopeBackward struct {
	D          Buffer // [T,W], in place
	In         Buffer // [T,W], Rope's input; needed only with QW
	Pos        Buffer
	T          int
	H, KV, HD  int
	Theta      float64
	QW, KW     Buffer
	DQW, DKW   Buffer // [hd] each; += with Accumulate, else =
	Rstd       Buffer
	Accumulate bool
}

// Strided is a matrix whose rows lie Stride elements apart in Buf, starting at element Off.
type Strided struct {
	Buf         Buffer
	Off, Stride int
}

// Attention is softmax(q·kᵀ/sqrt(hd))·v over a Layout's segments with grouped
// heads (query head h uses key head h/(H/KV)), by online softmax (Dao 2023,
// arXiv 2307.08691): no [T,T] matrix is stored.
type Attention struct {
	Out       Buffer  // [rows of q, H*hd]
	LSE       Buffer  // F32[rows of q, H], log-sum-exp of the scaled scores; nil when no backward follows
	Q, K, V   Strided // own rows
	PK, PV    Strided // rows that Segment.Prefix counts in; the same as K, V in training
	Layout    Layout
	T         int // rows of q
	H, KV, HD int
	Scratch   Arena
}

// AttentionBackward writes the gradients of q, k and v as packed rows DQKV[T,W].
// It applies to training layouts only: Q, K, V and the prefixes index the same T rows
// of QKV. A prompt's gradients sum over all segments that share it.
type AttentionBackward struct {
	DQKV      Buffer // [T,W]
	DOut, Out Buffer // [T,H*hd]
	LSE       Buffer // F32[T,H]
	QKV       Buffer // [T,W], after Rope
	Layout    Layout
	T         int
	H, KV, HD int
	Scratch   Arena
}

// Head is the LM head over N rows: z = Hidden·Wᵀ/Temperature, LogProb =
// z[target] - logsumexp(z), Entropy = -sum p·log p, in float32, over chunks of
// rows so that no [N,V] matrix is stored.
type Head struct {
	Hidden      Buffer // [N,d]
	W           Buffer // [V,d]
	Targets     Buffer // I32[N]
	LogProb     Buffer // F32[N], written
	Entropy     Buffer // F32[N], written; nil: not computed
	N, D, V     int
	Temperature float32
	Scratch     Arena
}

// HeadGrad says what the gradient of the loss with respect to each row's
// log-prob and entropy is, and where the gradients of Hidden and W go.
//
// With Surrogate, the coefficients are computed on the device from the fresh
// log-probs (one pass over the logits). Without it, DLogProb and DEntropy give
// them, as sequence-level objectives need.
type HeadGrad struct {
	Surrogate *Surrogate
	Tokens    SurrogateTokens // with Surrogate
	DLogProb  Buffer          // F32[N]; without Surrogate
	DEntropy  Buffer          // F32[N] or nil; without Surrogate

	DHidden    Buffer // [N,d], overwritten
	DW         Buffer // [V,d]
	Accumulate bool   // add to DW instead of overwriting it
}

// SurrogateTokens are the per-row inputs of a Surrogate, all F32[N].
type SurrogateTokens struct {
	Old    Buffer // log-probs under the old policy; nil: the fresh ones (ratio exactly 1)
	Ref    Buffer // log-probs under the reference policy; nil when Surrogate.Beta is 0
	Adv    Buffer // advantage of the row's completion
	Weight Buffer // share of the row in the loss, 0 when masked
	TIS    Buffer // truncated-importance-sampling factor; nil: 1
}

// Draw samples one token per row: temperature, then top-p (nucleus) on the
// tempered distribution, then inversion of the cumulative sum at U. LogProb is
// that of the full tempered softmax, before top-p. Temperature 0 takes the
// arg-max (lowest id on a tie) and reports the log-prob at temperature 1.
type Draw struct {
	Hidden      Buffer // [N,d]
	W           Buffer // [V,d]
	U           Buffer // F32[N], uniform in [0,1)
	Tokens      Buffer // I32[N], written
	LogProb     Buffer // F32[N], written
	N, D, V     int
	Temperature float32
	TopP        float32 // in (0,1]; 1 keeps everything
	Scratch     Arena
}

// AdvantageScale is what a group's centred rewards are divided by.
type AdvantageScale uint8

const (
	ScaleNone AdvantageScale = iota // SA-GRPO, Dr. GRPO
	ScaleStd                        // sample standard deviation (n-1) + 1e-4
)

// Advantages computes Out[i] = (R[i] - mean of its group) / scale in float64 on
// host slices; group g is rows [Start[g], Start[g+1]).
type Advantages struct {
	Out, R []float64
	Start  []int32
	Scale  AdvantageScale
}
