package tokenizer

import (
	"fmt"
	"unicode"

	"github.com/dlclark/regexp2"
)

// gpt2Pattern is the split of the ByteLevel pre-tokenizer (Radford et al. 2019).
const gpt2Pattern = `'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`

// step is one pre-tokenizer: a cut of every piece into smaller ones.
type step struct {
	cut    func(piece []rune) [][]rune // nil: leaves pieces whole
	prefix bool                        // put a space before a piece that does not begin with one
	last   bool                        // a ByteLevel, after which pieces are bytes
}

// pieces cuts text as the file's pre-tokenizers say. The patterns look ahead
// ("\s+(?!\S)": a run of spaces leaves its last one to the next word), which
// Go's regexp cannot, hence regexp2.
func (t *Tokenizer) pieces(text string) []string {
	list := [][]rune{[]rune(text)}
	for _, s := range t.steps {
		if s.prefix {
			for i, p := range list {
				if len(p) > 0 && p[0] != ' ' {
					list[i] = append([]rune{' '}, p...)
				}
			}
		}
		if s.cut == nil {
			continue
		}
		var next [][]rune
		for _, p := range list {
			next = append(next, s.cut(p)...)
		}
		list = next
	}
	out := make([]string, len(list))
	for i, p := range list {
		out[i] = string(p)
	}
	return out
}

func stepsOf(c *component, at string) ([]step, error) {
	if c == nil {
		return nil, nil
	}
	switch c.Type {
	case "Sequence":
		var out []step
		for i, part := range c.PreTokenizers {
			s, err := stepsOf(part, fmt.Sprintf("%s.pretokenizers[%d]", at, i))
			if err != nil {
				return nil, err
			}
			if len(out) > 0 && out[len(out)-1].last && len(s) > 0 {
				return nil, refuse(at, part.Type+" after ByteLevel", "ByteLevel as the last step")
			}
			out = append(out, s...)
		}
		return out, nil
	case "Digits":
		return []step{{cut: digits(c.IndividualDigits)}}, nil
	case "Split":
		if c.Pattern == nil || c.Pattern.Regex == "" || c.Behavior != "Isolated" || c.Invert {
			return nil, refuse(at, "Split "+c.Behavior, "a Split by Regex, Isolated, not inverted")
		}
		cut, err := isolate(c.Pattern.Regex)
		if err != nil {
			return nil, refuse(at+".pattern", err, "a regular expression")
		}
		return []step{{cut: cut}}, nil
	case "ByteLevel":
		s := step{prefix: c.AddPrefixSpace, last: true}
		if c.UseRegex == nil || *c.UseRegex {
			var err error
			if s.cut, err = isolate(gpt2Pattern); err != nil {
				return nil, err
			}
		}
		return []step{s}, nil
	}
	return nil, refuse(at, c.Type, "Sequence, Digits, Split or ByteLevel")
}

// digits cuts around numeric characters, each its own piece or in runs.
func digits(each bool) func([]rune) [][]rune {
	return func(p []rune) [][]rune {
		var out [][]rune
		from := 0
		for i := 1; i <= len(p); i++ {
			if i < len(p) {
				a, b := unicode.IsNumber(p[i-1]), unicode.IsNumber(p[i])
				if a == b && !(each && a) {
					continue
				}
			}
			out = append(out, p[from:i])
			from = i
		}
		return out
	}
}

// isolate cuts at the matches of a pattern: each match and each gap is a piece.
func isolate(pattern string) (func([]rune) [][]rune, error) {
	re, err := regexp2.Compile(pattern, regexp2.None)
	if err != nil {
		return nil, fmt.Errorf("compile pattern %q: %w", pattern, err)
	}
	return func(p []rune) [][]rune {
		var out [][]rune
		from := 0
		// Errors are time-outs only, and none is set.
		m, _ := re.FindRunesMatch(p)
		for ; m != nil; m, _ = re.FindNextMatch(m) {
			if m.Length == 0 {
				continue
			}
			if m.Index > from {
				out = append(out, p[from:m.Index])
			}
			from = m.Index + m.Length
			out = append(out, p[m.Index:from])
		}
		if from < len(p) {
			out = append(out, p[from:])
		}
		return out
	}, nil
}
