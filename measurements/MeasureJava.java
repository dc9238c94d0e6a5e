import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import ko.sentence.SentenceEncoder;

/**
 * The Java side of measure_java.py: for each line of stdin, a batch size and a number of sentences,
 * prints the seconds that they take.
 *
 * <pre>java -cp JAR MeasureJava.java MODEL.onnx THREADS SENTENCES.txt</pre>
 */
public final class MeasureJava {
    public static void main(String[] arguments) throws Exception {
        List<String> texts = Files.readAllLines(Path.of(arguments[2]));
        BufferedReader orders = new BufferedReader(new InputStreamReader(System.in));
        try (SentenceEncoder encoder =
                SentenceEncoder.load(Path.of(arguments[0]), Integer.parseInt(arguments[1]))) {
            String order;
            while ((order = orders.readLine()) != null) {
                int size = Integer.parseInt(order.split(" ")[0]);
                int count = Integer.parseInt(order.split(" ")[1]);
                long start = System.nanoTime();
                for (int place = 0; place < count; place += size) {
                    encoder.encode(texts.subList(place, place + size));
                }
                System.out.println((System.nanoTime() - start) / 1e9);
            }
        }
    }
}
