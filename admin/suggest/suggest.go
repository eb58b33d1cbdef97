package suggest

import "strings"

// maxWord bounds the work for foreign input: no word that we know is longer.
const maxWord = 64

// Closest returns the word among those known that is nearest to word: at most a third of its letters (at least one,
// at most three) have to be changed, inserted, left out or exchanged with their neighbour; capitals, dashes and
// underscores do not count. It is "" where none is near. Of equally near ones the first is taken.
func Closest(word string, known []string) string {
	w := plain(word)
	if w == "" || len(word) > maxWord {
		return ""
	}
	best, least := "", max(1, min(3, len(w)/3))+1
	for _, k := range known {
		if d := distance(w, plain(k)); d < least {
			best, least = k, d
		}
	}
	return best
}

// DidYouMean is Closest as the end of an error's text: `; did you mean "list"?`, or "".
func DidYouMean(word string, known []string) string {
	c := Closest(word, known)
	if c == "" {
		return ""
	}
	return `; did you mean "` + c + `"?`
}

func plain(s string) string {
	return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(s))
}

// distance is Damerau's and Levenshtein's (optimal string alignment), by bytes.
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
