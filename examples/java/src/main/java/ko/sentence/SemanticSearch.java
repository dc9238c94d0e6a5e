package ko.sentence;

import java.io.Console;
import java.io.IOException;
import java.io.PrintStream;
import java.nio.charset.Charset;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Comparator;
import java.util.List;
import java.util.Locale;
import java.util.stream.IntStream;

/**
 * Semantic search: the five most similar of nine sentences for each of three queries.
 *
 * <pre>java -jar target/semantic-search.jar MODEL.onnx [SENTENCES.txt [QUERY ...]]</pre>
 *
 * <p>A file holds one sentence a line, in UTF-8. The nine sentences come from
 * https://github.com/BM-K/KoSentenceBERT-SKT.
 */
public final class SemanticSearch {
    static final List<String> CORPUS =
            List.of(
                    "한 남자가 음식을 먹는다.",
                    "한 남자가 빵 한 조각을 먹는다.",
                    "그 여자가 아이를 돌본다.",
                    "한 남자가 말을 탄다.",
                    "한 여자가 바이올린을 연주한다.",
                    "두 남자가 수레를 숲 속으로 밀었다.",
                    "한 남자가 담으로 싸인 땅에서 백마를 타고 있다.",
                    "원숭이 한 마리가 드럼을 연주한다.",
                    "치타 한 마리가 먹이 뒤에서 달리고 있다.");
    static final List<String> QUERIES =
            List.of(
                    "한 남자가 파스타를 먹는다.",
                    "고릴라 의상을 입은 누군가가 드럼을 연주하고 있다.",
                    "치타가 들판을 가로 질러 먹이를 쫓는다.");
    private static final int TOP_K = 5;

    private SemanticSearch() {}

    /** Prints what was found; a bad argument is one line on stderr and exit status 2. */
    public static void main(String[] arguments) {
        PrintStream errors = new PrintStream(System.err, true, consoleCharset());
        try {
            if (arguments.length == 0) {
                throw new IOException("usage: MODEL.onnx [SENTENCES.txt [QUERY ...]]");
            }
            List<String> corpus = arguments.length < 2 ? CORPUS : readLines(Path.of(arguments[1]));
            List<String> queries = Arrays.stream(arguments).skip(2).toList();
            search(
                    Path.of(arguments[0]),
                    corpus,
                    queries.isEmpty() ? QUERIES : queries,
                    new PrintStream(System.out, true, consoleCharset()));
        } catch (IOException error) {
            errors.println("error: " + error.getMessage());
            System.exit(2);
        }
    }

    private static void search(
            Path model, List<String> corpus, List<String> queries, PrintStream out)
            throws IOException {
        try (SentenceEncoder encoder = SentenceEncoder.load(model)) {
            float[][] found = encoder.encode(corpus);
            float[][] asked = encoder.encode(queries);
            for (int query = 0; query < asked.length; query++) {
                double[] scores = new double[found.length];
                for (int i = 0; i < found.length; i++) {
                    scores[i] = cosine(asked[query], found[i]);
                }
                out.println(queries.get(query));
                List<Integer> order =
                        IntStream.range(0, scores.length)
                                .boxed()
                                .sorted(Comparator.comparingDouble(i -> -scores[i]))
                                .limit(TOP_K)
                                .toList();
                for (int i : order) {
                    out.printf(Locale.ROOT, "  %.4f  %s%n", scores[i], corpus.get(i));
                }
            }
        }
    }

    private static double cosine(float[] first, float[] second) {
        double dot = 0;
        double ofFirst = 0;
        double ofSecond = 0;
        for (int i = 0; i < first.length; i++) {
            dot += first[i] * second[i];
            ofFirst += first[i] * first[i];
            ofSecond += second[i] * second[i];
        }
        return dot / Math.sqrt(ofFirst * ofSecond);
    }

    private static List<String> readLines(Path path) throws IOException {
        List<String> lines;
        try {
            lines = Files.readAllLines(path).stream().filter(line -> !line.isBlank()).toList();
        } catch (IOException error) {
            throw new IOException(path + ": no text file in UTF-8", error);
        }
        if (lines.isEmpty()) {
            throw new IOException(path + ": no sentences");
        }
        return lines;
    }

    /** Returns what the terminal reads; UTF-8 for files, pipes and machines without a locale. */
    private static Charset consoleCharset() {
        Console console = System.console();
        boolean none = console == null || console.charset().equals(StandardCharsets.US_ASCII);
        return none ? StandardCharsets.UTF_8 : console.charset();
    }
}
