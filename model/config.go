package model

// Config is the architecture of a decoder, independent of any file format.
type Config struct {
	Type         string // Hugging Face model_type: "llama", "qwen2" or "qwen3"
	Vocab        int    // V
	Hidden       int    // d
	FFN          int    // F
	Layers       int
	Heads        int // H
	KVHeads      int // KV, divides Heads
	HeadDim      int // hd, even
	MaxPositions int // longest prompt + completion
	RopeTheta    float64
	NormEps      float64
	Tied         bool // the LM head is the embedding
	QKVBias      bool // Qwen2
	QKNorm       bool // Qwen3
	InitStd      float64
	BOS          int32   // -1 for none
	EOS          []int32 // ids that end a completion
}
